// AdamW and SGD with momentum, set as in sinkbook/toy/optimizers.py.

const WEIGHT_DECAY = 1e-4; // on all parameters

class AdamW {
  constructor(model, rate) {
    Object.assign(this, { model, rate, steps: 0 });
    this.mean = new Float32Array(model.count);
    this.square = new Float32Array(model.count);
  }

  step() {
    const { model, rate, mean, square } = this;
    const { H, gradients, count } = model;
    const [beta1, beta2, epsilon] = [0.9, 0.99, 1e-8];
    this.steps++;
    const size = rate / (1 - beta1 ** this.steps);
    const correction = Math.sqrt(1 - beta2 ** this.steps);
    for (let i = 0; i < count; i++) {
      const g = H[gradients + i];
      mean[i] += (g - mean[i]) * (1 - beta1);
      square[i] = beta2 * square[i] + (1 - beta2) * g * g;
      const change = (size * mean[i]) / (Math.sqrt(square[i]) / correction + epsilon);
      H[i] = H[i] * (1 - rate * WEIGHT_DECAY) - change;
    }
  }
}

class SGD {
  constructor(model, rate) {
    Object.assign(this, { model, rate, steps: 0 });
    this.velocity = new Float32Array(model.count);
  }

  step() {
    const { model, rate, velocity } = this;
    const { H, gradients, count } = model;
    const momentum = this.steps++ ? 0.9 : 0;
    for (let i = 0; i < count; i++) {
      velocity[i] = momentum * velocity[i] + H[gradients + i] + WEIGHT_DECAY * H[i];
      H[i] -= rate * velocity[i];
    }
  }
}

const OPTIMIZERS = { adamw: AdamW, sgd: SGD };
