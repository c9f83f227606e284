// Train it: a one-layer transformer learns on the reader's device, while one looks at its head.

const RATES = [0.002, 0.006, 0.02, 0.06, 0.2];
const SEEDS = [1, 2, 3, 5];
const USUAL_RATE = { adamw: 0.02, sgd: 0.2 };
const CURVES = ["sink", "drain", "sinkLogit", "backcopy", "bigram"];

class TrainingLab {
  /**
   * `about` has the `settings` of a training and, in a `compact` one, few choices. One that `starts`
   * by itself does so when it is seen, unless the reader has asked for calm.
   */
  constructor(root, about) {
    Object.assign(this, { root, about, id: 0, running: false, before: null });
    this.settings = { ...about.settings };
    this.task = null;
    this.build();
    this.reset();
    if (about.starts && !calm()) this.whenSeen(() => this.go());
  }

  build() {
    const { about, root, settings } = this;
    this.button = html("button", {
      type: "button",
      class: "lab-main",
      onclick: () => this.toggle(),
    });
    this.oneStep = html(
      "button",
      { type: "button", onclick: () => this.run(this.step + 1) },
      "One step",
    );
    const again = html("button", { type: "button", onclick: () => this.reset() }, "Start again");
    this.progress = html("progress", {
      max: settings.steps,
      value: 0,
      "aria-label": "steps of the training",
    });
    this.count = html("span", { class: "lab-count" });
    const set = (name) => (value) => this.change({ [name]: value });
    const kernel = choice(
      "Attention",
      [
        ["softmax", "softmax"],
        ["relu", "ReLU"],
      ],
      settings.attention,
      set("attention"),
    );
    const more = about.compact
      ? []
      : [
          choice(
            "Start token",
            [
              [1, "with <s>"],
              [0, "without"],
            ],
            settings.starts,
            (value) => this.change({ starts: +value }),
          ),
          choice(
            "Optimizer",
            [
              ["adamw", "AdamW"],
              ["sgd", "SGD"],
            ],
            settings.optimizer,
            (optimizer) => {
              this.rate.querySelector("select").value = USUAL_RATE[optimizer];
              this.change({ optimizer, rate: USUAL_RATE[optimizer] });
            },
          ),
          (this.rate = selection(
            "Learning rate",
            RATES.map((r) => [r, String(r)]),
            settings.rate,
            (r) => this.change({ rate: +r }),
          )),
          selection("Seed", seedsInWords(about.slow), settings.seed, (seed) =>
            this.change({ seed: +seed }),
          ),
        ];
    this.map = new MapView();
    this.curves = about.compact
      ? trainingCurves().filter((curve) => curve.title !== "sink logit")
      : trainingCurves();
    this.status = new Status();
    root.replaceChildren(
      html(
        "div",
        { class: "lab-controls" },
        this.button,
        about.compact ? "" : this.oneStep,
        again,
        kernel,
      ),
      html("div", { class: "lab-progress" }, this.progress, this.count),
      board(this.map, this.curves),
      this.status.node,
      more.length ? html("div", { class: "lab-controls" }, ...more) : "",
    );
  }

  whenSeen(act) {
    const watch = new IntersectionObserver(
      (seen) => {
        if (!seen.some((one) => one.isIntersecting)) return;
        watch.disconnect();
        if (!this.running && this.step === 0) act();
      },
      { threshold: 0.5 },
    );
    watch.observe(this.root);
  }

  /** Another choice is another training; what was learnt so far stays in sight, faint. */
  change(some) {
    Object.assign(this.settings, some);
    const goOn = this.running;
    this.reset();
    if (goOn) this.go();
  }

  reset() {
    const learnt = this.frames && this.frames.x.length > 2;
    this.before = learnt ? { ...this.frames, last: this.last } : this.before;
    this.frames = { x: [], lines: Object.fromEntries(CURVES.map((key) => [key, []])) };
    this.step = 0;
    this.until = this.settings.steps;
    this.running = false;
    this.id++;
    this.task = new Task(window.sinkbookStatistics, { starts: this.settings.starts });
    this.post({
      kind: "new",
      statistics: window.sinkbookStatistics,
      settings: this.settings,
      kernel: this.about.kernel,
    });
    this.relabel();
  }

  toggle() {
    if (this.running) this.stop();
    else this.go();
  }

  go() {
    if (this.step >= this.until) this.until += this.settings.steps;
    this.running = true;
    this.run(this.until);
  }

  run(until) {
    this.until = Math.max(until, this.until);
    this.post({ kind: "run", until });
    this.relabel();
  }

  stop() {
    this.running = false;
    this.post({ kind: "stop" });
    this.relabel();
  }

  post(message) {
    this.server ??= startServer((frame) => this.receive(frame));
    this.server({ id: this.id, ...message });
  }

  receive(frame) {
    if (frame.id !== this.id) return; // of a training that is no more
    this.step = frame.step;
    this.last = frame;
    if (this.step >= this.until) this.running = false;
    const { x, lines } = this.frames;
    if (x.at(-1) !== frame.step) {
      x.push(frame.step);
      for (const key of CURVES) lines[key].push(frame[key]);
    }
    this.relabel();
    const resting = !this.running || frame.step === frame.until;
    if (calm() && !resting && performance.now() < (this.shownAt ?? 0) + 1500) return;
    this.shownAt = performance.now();
    this.show(frame, resting);
  }

  show(frame, resting) {
    const tokens = this.task.encode(this.settings.example).tokens.slice(0, this.settings.length);
    const says = this.inWords(frame);
    this.map.show({
      labels: this.task.labels(tokens),
      triggers: this.task.atTriggers(tokens),
      map: frame.map,
      values: frame.values,
      says,
    });
    const all = Math.max(this.until, this.before?.x.at(-1) ?? 0);
    const scaled = (x) => x.map((step) => step / all);
    const before = this.before && { x: scaled(this.before.x), lines: this.before.lines };
    for (const curve of this.curves)
      curve.show({ x: scaled(this.frames.x), lines: this.frames.lines, before });
    this.status.say(says, { now: resting });
  }

  relabel() {
    const words = this.running ? "Stop" : this.step === 0 ? "Train" : "Go on";
    this.button.replaceChildren(
      svg(
        "svg",
        { viewBox: "0 0 12 12", width: 11, height: 11, "aria-hidden": "true" },
        svg("path", { d: this.running ? "M2 1h3v10H2zM7 1h3v10H7z" : "M2 0.5L11 6L2 11.5z" }),
      ),
      ` ${words}`,
    );
    this.button.setAttribute("aria-pressed", this.running);
    this.oneStep.disabled = this.running;
    fill(this.progress, { max: this.until, value: this.step }, []);
    this.count.textContent = `step ${this.step} of ${this.until}`;
  }

  inWords(frame) {
    const first = this.settings.starts ? "<s>" : "the first character";
    if (frame.step === 0)
      return `A new-born model: it looks everywhere a little, ${first} gets ${number(frame.sink)} of the attention.`;
    const sink =
      this.settings.attention === "relu" && frame.sink < 0.05
        ? `the head gives ${first} ${number(frame.sink)}: with ReLU it may look at nothing, and needs no sink`
        : `ordinary characters give ${first} ${number(frame.sink)} of their attention`;
    return `After ${frame.step} steps ${sink}. Its value is ${number(frame.drain)} times as long as the others'.`;
  }
}

/** The seeds to choose from; one of them is slow, and says so. */
function seedsInWords(slow) {
  return [...SEEDS.map((seed) => [seed, String(seed)]), [slow, `${slow}, a slow one`]];
}

/** `serve` in a worker, or here where a page may have none. Returns what takes messages. */
function startServer(receive) {
  try {
    const script = `
      const take = (${makeEngine})().serve((frame) => postMessage(frame));
      onmessage = (event) => take(event.data);`;
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    const worker = new Worker(address);
    worker.onmessage = (event) => receive(event.data);
    return (message) => worker.postMessage(message);
  } catch {
    return serve(receive);
  }
}
