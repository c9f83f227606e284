// A training, step by step, and what is shown of it. It runs in a worker, so that the page stays
// alive.

const EVALUATED = 24; // texts on which a model is measured, none of them trained on

class Training {
  constructor(statistics, settings, kernel) {
    const { width, length, batch, seed, rate, optimizer, attention, starts } = settings;
    Object.assign(this, { settings, steps: 0, loss: NaN });
    this.task = new Task(statistics, { starts });
    const config = { vocab: this.task.vocabSize, length, width, attention };
    this.model = new Model(config, kernel, batch).initialize(new Random(seed, 1));
    this.optimizer = new OPTIMIZERS[optimizer](this.model, rate);
    this.random = new Random(seed, 2);
    this.texts = this.task.batch(EVALUATED, length, new Random(0, 3));
    this.example = this.task.encode(settings.example).tokens.slice(0, length);
  }

  step() {
    const { batch, length } = this.settings;
    const texts = this.task.batch(batch, length, this.random);
    this.model.forward(texts, batch, length, length + 1);
    this.loss = this.model.backward();
    this.optimizer.step();
    this.steps++;
  }

  /** The six numbers, and how the head reads the example. */
  frame() {
    const { length } = this.settings;
    const { task, model, example } = this;
    const measured = measure(model, task, this.texts, {
      length,
      step: length + 1,
      count: EVALUATED,
    });
    model.forward(example, 1, example.length, example.length);
    const values = Array.from(example, (_, n) => model.valueNorm(0, n));
    return { step: this.steps, ...measured, map: model.map(0), values };
  }
}

const FRAME_SECONDS = 0.07; // the least time between two pictures: faster cannot be followed
const DENSE = 8; // the first steps are shown one by one
const STEPS_A_FRAME = 4;

/** What answers the page's messages: `send` is called with every frame of a training. */
function serve(send) {
  let training = null;
  let until = 0;
  let timer = null;

  const show = () => send({ id: training.id, until, ...training.frame() });

  function run() {
    timer = null;
    const began = performance.now();
    do training.step();
    while (training.steps > DENSE && training.steps % STEPS_A_FRAME && training.steps < until);
    show();
    if (training.steps < until) {
      const left = 1000 * FRAME_SECONDS - (performance.now() - began);
      timer = setTimeout(run, Math.max(left, 0));
    }
  }

  return function receive(message) {
    clearTimeout(timer);
    timer = null;
    if (message.kind === "new") {
      const kernel = message.kernel === "plain" ? plainKernel() : fastestKernel();
      training = new Training(message.statistics, message.settings, kernel);
      training.id = message.id;
      until = 0;
      show();
    } else if (message.kind === "run") {
      until = message.until;
      if (training.steps < until) timer = setTimeout(run, 0);
    } else if (message.kind === "stop") {
      until = training.steps;
      show();
    }
  };
}
