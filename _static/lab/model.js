// The toy of sinkbook/toy/transformer.py with one layer and one head: forward and backward by hand.
//
//     x <- x + W_O A(LN(x)) V,   x <- x + W_2 relu(W_1 LN(x)),   logits = W LN(x)
//
// Parameters have the names and the order of the Python model's, one after the other in memory, and
// so have their gradients. States are rows; a row of logits or of attention weights is padded to a
// multiple of four columns, as the product asks for.

const EPSILON = 1e-5; // of the layer norms, torch's

const padded = (count) => (count + 3) & ~3;

class Model {
  /**
   * `config` has `vocab`, `length`, `width` and `attention`, "softmax" or "relu"; `texts` is how
   * many are read at once. Widths are multiples of four.
   */
  constructor(config, kernel, texts) {
    Object.assign(this, { config, kernel, texts, H: kernel.floats, used: 0 });
    const { vocab, length, width } = config;
    const inner = 4 * width;
    this.parameters = [];
    const parameter = (name, rows, columns) => {
      const made = { name, rows, columns, size: rows * columns, at: this.reserve(rows * columns) };
      this.parameters.push(made);
      return made;
    };
    this.token = parameter("token_embedding.weight", vocab, width);
    this.position = parameter("position_embedding.weight", length, width);
    for (const name of ["wq", "wk", "wv", "wo"])
      this[name] = parameter(`layers.0.attention.${name}.weight`, width, width);
    this.w1 = parameter("layers.0.mlp.w1.weight", inner, width);
    this.w2 = parameter("layers.0.mlp.w2.weight", width, inner);
    for (const [short, name] of [
      ["norm1", "layers.0.attention_norm"],
      ["norm2", "layers.0.mlp_norm"],
      ["norm3", "final_norm"],
    ]) {
      this[short] = parameter(`${name}.weight`, 1, width);
      parameter(`${name}.bias`, 1, width); // right behind the gain
    }
    this.output = parameter("output.weight", vocab, width);
    this.count = this.used;
    this.gradients = this.reserve(this.count);
    this.reserveStates();
  }

  reserve(count) {
    const at = this.used;
    this.used += padded(count);
    if (this.used > this.H.length) throw new Error("the model is too large for a page's memory");
    return at;
  }

  reserveStates() {
    const { vocab, length, width } = this.config;
    const rows = this.texts * length;
    const states = (columns) => this.reserve(rows * columns);
    this.logitRow = padded(vocab);
    for (const name of ["x0", "x1", "x2", "q", "k", "v", "o", "dx", "dn", "dq", "dk", "dv", "do"])
      this[name] = states(width);
    this.norms = [1, 2, 3].map(() => ({
      normal: states(width), // before gain and bias
      out: states(width),
      scale: states(1), // one over the standard deviation
    }));
    this.hidden = states(4 * width);
    this.dHidden = states(4 * width);
    this.logits = states(this.logitRow);
    this.scores = states(padded(length));
    this.weights = states(padded(length)); // attention
    this.dWeights = states(padded(length));
    this.written = states(width);
    this.turned = this.reserve(Math.max(4 * width * width, width * this.logitRow));
  }

  /** Initial values as torch draws them: normal embeddings, uniform matrices, norms of one. */
  initialize(random) {
    for (const { name, at, size, columns } of this.parameters) {
      const bound = 1 / Math.sqrt(columns);
      for (let i = at; i < at + size; i++) {
        if (name.includes("embedding")) this.H[i] = random.normal();
        else if (name.includes("norm")) this.H[i] = name.endsWith("weight") ? 1 : 0;
        else this.H[i] = bound * (2 * random.uniform() - 1);
      }
    }
    return this;
  }

  /** Take the weights of a trained model, all parameters one after the other. */
  load(values) {
    let from = 0;
    for (const { at, size } of this.parameters) {
      this.H.set(values.subarray(from, from + size), at);
      from += size;
    }
    if (from !== values.length) throw new Error(`${values.length} weights for a model of ${from}`);
    return this;
  }

  /** `out = x W^T`, or added to what is there. */
  linear(x, w, out, rows, { outRow = w.rows, add = 0 } = {}) {
    this.turn(w.at, w.rows, w.columns, w.columns, outRow);
    this.kernel.product(
      x,
      w.columns,
      1,
      this.turned,
      outRow,
      out,
      outRow,
      rows,
      outRow,
      w.columns,
      add,
    );
  }

  /** A matrix transposed, in `turned`, its rows `row` apart and their padding zero. */
  turn(at, rows, columns, step, row) {
    const { H, turned } = this;
    for (let j = 0; j < columns; j++) {
      for (let i = 0; i < rows; i++) H[turned + j * row + i] = H[at + i * step + j];
      for (let i = rows; i < row; i++) H[turned + j * row + i] = 0;
    }
  }

  layerNorm(x, gain, { normal, out, scale }, rows) {
    const { H } = this;
    const d = this.config.width;
    for (let n = 0; n < rows; n++) {
      const at = n * d;
      let mean = 0;
      let square = 0;
      for (let i = 0; i < d; i++) mean += H[x + at + i];
      mean /= d;
      for (let i = 0; i < d; i++) square += (H[x + at + i] - mean) ** 2;
      const factor = 1 / Math.sqrt(square / d + EPSILON);
      H[scale + n] = factor;
      for (let i = 0; i < d; i++) {
        const z = (H[x + at + i] - mean) * factor;
        H[normal + at + i] = z;
        H[out + at + i] = z * H[gain.at + i] + H[gain.at + d + i];
      }
    }
  }

  /**
   * Read `texts` texts of `length` tokens, which lie `step` apart in `tokens`.
   *
   * Leaves `logits`, `scores` (before the causal mask), attention `weights` and the values as the
   * head writes them, `written`, in memory. `cut` may name "head" or "mlp", which then write
   * nothing; with `ordinary` the first value of a text is as long, once written, as the others'
   * mean.
   */
  forward(tokens, texts, length, step, { cut = [], ordinary = false } = {}) {
    const { H } = this;
    const d = this.config.width;
    const rows = texts * length;
    Object.assign(this, { tokens, rows, length, step, read: texts });
    for (let n = 0; n < rows; n++) {
      const from = this.token.at + tokens[Math.floor(n / length) * step + (n % length)] * d;
      const place = this.position.at + (n % length) * d;
      for (let i = 0; i < d; i++) H[this.x0 + n * d + i] = H[from + i] + H[place + i];
    }
    const [first, second, third] = this.norms;
    this.layerNorm(this.x0, this.norm1, first, rows);
    this.linear(first.out, this.wq, this.q, rows);
    this.linear(first.out, this.wk, this.k, rows);
    this.linear(first.out, this.wv, this.v, rows);
    this.linear(this.v, this.wo, this.written, rows);
    if (ordinary) this.lengthenFirst();
    for (let text = 0; text < texts; text++) this.attend(text);
    H.copyWithin(this.x1, this.x0, this.x0 + rows * d);
    if (!cut.includes("head")) this.linear(this.o, this.wo, this.x1, rows, { add: 1 });
    this.layerNorm(this.x1, this.norm2, second, rows);
    this.linear(second.out, this.w1, this.hidden, rows);
    for (let i = this.hidden; i < this.hidden + rows * 4 * d; i++) if (H[i] < 0) H[i] = 0;
    H.copyWithin(this.x2, this.x1, this.x1 + rows * d);
    if (!cut.includes("mlp")) this.linear(this.hidden, this.w2, this.x2, rows, { add: 1 });
    this.layerNorm(this.x2, this.norm3, third, rows);
    this.linear(third.out, this.output, this.logits, rows, { outRow: this.logitRow });
    return this;
  }

  attend(text) {
    const { H, length } = this;
    const d = this.config.width;
    const row = padded(length);
    const [q, k, v, o] = [this.q, this.k, this.v, this.o].map((x) => x + text * length * d);
    const scores = this.scores + text * length * row;
    const weights = this.weights + text * length * row;
    this.turn(k, length, d, d, row);
    this.kernel.product(q, d, 1, this.turned, row, scores, row, length, row, d, 0);
    const scaling = 1 / Math.sqrt(d);
    for (let n = 0; n < length; n++) {
      const s = scores + n * row;
      const a = weights + n * row;
      let largest = -Infinity;
      for (let j = 0; j < length; j++) H[s + j] *= scaling;
      for (let j = 0; j <= n; j++) largest = Math.max(largest, H[s + j]);
      let sum = 0;
      for (let j = 0; j < row; j++) {
        if (j > n) H[a + j] = 0;
        else if (this.config.attention === "relu") H[a + j] = Math.max(H[s + j], 0) / (n + 1);
        else sum += H[a + j] = Math.exp(H[s + j] - largest);
      }
      if (this.config.attention === "softmax") for (let j = 0; j <= n; j++) H[a + j] /= sum;
    }
    this.kernel.product(weights, row, 1, v, d, o, d, length, d, length, 0);
  }

  /** The first value of each text as long, once written, as the others' mean. */
  lengthenFirst() {
    const { H } = this;
    const d = this.config.width;
    for (let text = 0; text < this.read && this.length > 1; text++) {
      let others = 0;
      for (let n = 1; n < this.length; n++) others += this.valueNorm(text, n) / (this.length - 1);
      const factor = others / Math.max(this.valueNorm(text, 0), 1e-12);
      const at = text * this.length * d;
      for (let i = 0; i < d; i++) {
        H[this.v + at + i] *= factor;
        H[this.written + at + i] *= factor;
      }
    }
  }

  /** The norm of a token's value state, as W_O writes it. */
  valueNorm(text, position) {
    const d = this.config.width;
    const at = this.written + (text * this.length + position) * d;
    return Math.hypot(...this.H.subarray(at, at + d));
  }

  /** Attention weights of one text, row by row: those of query `n` on keys 0 to `n`. */
  map(text) {
    const row = padded(this.length);
    return Array.from({ length: this.length }, (_, n) => {
      const at = this.weights + (text * this.length + n) * row;
      return Array.from(this.H.subarray(at, at + n + 1));
    });
  }

  /** The next-token logits after one position. */
  logitsAt(text, position) {
    const at = this.logits + (text * this.length + position) * this.logitRow;
    return this.H.subarray(at, at + this.config.vocab);
  }

  /** Mean cross-entropy of the tokens that come next, and the gradients of all parameters. */
  backward() {
    const { H, rows, kernel } = this;
    const { width: d, vocab } = this.config;
    const [first, second, third] = this.norms;
    H.fill(0, this.gradients, this.gradients + this.count);
    const loss = this.logitGradients();
    this.add(this.logits, this.output, third.out, this.logitRow);
    kernel.product(this.logits, this.logitRow, 1, this.output.at, d, this.dn, d, rows, d, vocab, 0);
    H.fill(0, this.dx, this.dx + rows * d);
    this.normGradients(this.norm3, third);

    this.add(this.dx, this.w2, this.hidden);
    kernel.product(this.dx, d, 1, this.w2.at, 4 * d, this.dHidden, 4 * d, rows, 4 * d, d, 0);
    for (let i = 0; i < rows * 4 * d; i++) if (H[this.hidden + i] <= 0) H[this.dHidden + i] = 0;
    this.add(this.dHidden, this.w1, second.out);
    kernel.product(this.dHidden, 4 * d, 1, this.w1.at, d, this.dn, d, rows, d, 4 * d, 0);
    this.normGradients(this.norm2, second);

    this.add(this.dx, this.wo, this.o);
    kernel.product(this.dx, d, 1, this.wo.at, d, this.do, d, rows, d, d, 0);
    for (let text = 0; text < this.read; text++) this.attentionGradients(text);
    [this.wq, this.wk, this.wv].forEach((w, i) => {
      const change = [this.dq, this.dk, this.dv][i];
      this.add(change, w, first.out);
      kernel.product(change, d, 1, w.at, d, this.dn, d, rows, d, d, i > 0 ? 1 : 0);
    });
    this.normGradients(this.norm1, first);

    const { length, step, tokens } = this;
    for (let n = 0; n < rows; n++) {
      const token = tokens[Math.floor(n / length) * step + (n % length)];
      const to = this.gradients + this.token.at + token * d;
      const place = this.gradients + this.position.at + (n % length) * d;
      for (let i = 0; i < d; i++) {
        H[to + i] += H[this.dx + n * d + i];
        H[place + i] += H[this.dx + n * d + i];
      }
    }
    return loss;
  }

  /** Softmax minus the one that came, over the rows, in the place of the logits; returns the loss. */
  logitGradients() {
    const { H, rows, length, step, tokens } = this;
    const { vocab } = this.config;
    let loss = 0;
    for (let n = 0; n < rows; n++) {
      const at = this.logits + n * this.logitRow;
      const next = tokens[Math.floor(n / length) * step + (n % length) + 1];
      let largest = -Infinity;
      let sum = 0;
      for (let i = 0; i < vocab; i++) largest = Math.max(largest, H[at + i]);
      for (let i = 0; i < vocab; i++) sum += Math.exp(H[at + i] - largest);
      loss += (Math.log(sum) + largest - H[at + next]) / rows;
      for (let i = 0; i < vocab; i++) H[at + i] = Math.exp(H[at + i] - largest) / sum / rows;
      H[at + next] -= 1 / rows;
    }
    return loss;
  }

  /** The gradient of `w` in `y = x W^T`, of the gradient at `y`, whose rows are `step` apart. */
  add(dy, w, x, step = w.rows) {
    const to = this.gradients + w.at;
    this.kernel.product(dy, 1, step, x, w.columns, to, w.columns, w.rows, w.columns, this.rows, 1);
  }

  /** Add to `dx` what comes through a layer norm from `dn`, and the gradients of gain and bias. */
  normGradients(gain, { normal, scale }) {
    const { H, rows } = this;
    const d = this.config.width;
    const toGain = this.gradients + gain.at;
    for (let n = 0; n < rows; n++) {
      const at = n * d;
      let mean = 0;
      let along = 0;
      for (let i = 0; i < d; i++) {
        const dy = H[this.dn + at + i];
        const z = H[normal + at + i];
        H[toGain + i] += dy * z;
        H[toGain + d + i] += dy;
        mean += (dy * H[gain.at + i]) / d;
        along += (dy * H[gain.at + i] * z) / d;
      }
      for (let i = 0; i < d; i++) {
        const through = H[this.dn + at + i] * H[gain.at + i] - mean - H[normal + at + i] * along;
        H[this.dx + at + i] += through * H[scale + n];
      }
    }
  }

  attentionGradients(text) {
    const { H, length, kernel } = this;
    const d = this.config.width;
    const row = padded(length);
    const from = text * length * d;
    const [q, k, v, dq, dk, dv, dO] = [
      this.q,
      this.k,
      this.v,
      this.dq,
      this.dk,
      this.dv,
      this.do,
    ].map((x) => x + from);
    const weights = this.weights + text * length * row;
    const scores = this.scores + text * length * row;
    const change = this.dWeights + text * length * row;
    kernel.product(weights, 1, row, dO, d, dv, d, length, d, length, 0);
    this.turn(v, length, d, d, row);
    kernel.product(dO, d, 1, this.turned, row, change, row, length, row, d, 0);
    const scaling = 1 / Math.sqrt(d);
    for (let n = 0; n < length; n++) {
      const a = weights + n * row;
      const c = change + n * row;
      let mean = 0;
      for (let j = 0; j <= n; j++) mean += H[a + j] * H[c + j];
      for (let j = 0; j < row; j++) {
        if (j > n) H[c + j] = 0;
        else if (this.config.attention === "softmax")
          H[c + j] = H[a + j] * (H[c + j] - mean) * scaling;
        else H[c + j] = H[scores + n * row + j] > 0 ? (H[c + j] / (n + 1)) * scaling : 0;
      }
    }
    kernel.product(change, row, 1, k, d, dq, d, length, d, length, 0);
    kernel.product(change, 1, row, q, d, dk, d, length, d, length, 0);
  }
}
