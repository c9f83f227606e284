// Type a text: what a trained model looks at, how loud that is, and what it expects to come next.

const RISK_TEXTS = 48;

class TypedLab {
  /** `about` has `config`, `models` (weights by name), `text`, and `statistics` come from the page. */
  constructor(root, about) {
    Object.assign(this, { root, about, cut: new Set(), ordinary: false, row: null });
    this.models = {};
    this.name = Object.keys(about.models)[0];
    const starts = 1;
    this.task = new Task(window.sinkbookStatistics, { starts });
    const { length } = about.config;
    this.texts = this.task.batch(RISK_TEXTS, length, new Random(0, 3));
    this.build();
    this.readRisks();
    this.read({ now: true });
  }

  /** The model of a name, its weights loaded once; on the plain kernel if that is asked for. */
  model(name = this.name, kernel = "fastest") {
    const key = `${name} ${kernel}`;
    if (!this.models[key]) {
      const made = kernel === "plain" ? plainKernel() : fastestKernel();
      const config = {
        ...this.about.config,
        vocab: this.task.vocabSize,
        attention: this.about.models[name].attention,
      };
      this.models[key] = new Model(config, made, 12).load(
        decodeFloats(this.about.models[name].weights),
      );
    }
    return this.models[key];
  }

  build() {
    const { about, root } = this;
    const longest = about.config.length - 1;
    this.input = html("input", {
      type: "text",
      maxlength: longest,
      value: about.text,
      spellcheck: "false",
      autocomplete: "off",
      autocapitalize: "none",
      oninput: () => {
        this.row = null;
        this.read();
      },
    });
    const typing = html("label", { class: "lab-text" }, html("span", {}, "A text"), this.input);
    const changed = () => {
      this.readRisks();
      this.read();
    };
    const switches = html(
      "div",
      { class: "lab-controls" },
      choice(
        "Attention",
        Object.keys(about.models).map((name) => [name, name]),
        this.name,
        (name) => {
          this.name = name;
          changed();
        },
      ),
      toggle("head", true, (on) => {
        this.cut[on ? "delete" : "add"]("head");
        changed();
      }),
      toggle("MLP", true, (on) => {
        this.cut[on ? "delete" : "add"]("mlp");
        changed();
      }),
      toggle("loud <s>: its value as long as the others'", false, (on) => {
        this.ordinary = on;
        changed();
      }),
    );
    this.map = new MapView((row) => this.choose(row));
    this.slider = html("input", {
      type: "range",
      min: 0,
      value: 0,
      oninput: () => this.choose(+this.slider.value),
    });
    const position = html(
      "label",
      { class: "lab-slide" },
      html("span", {}, "read up to"),
      this.slider,
    );
    this.next = html("div", { class: "lab-next" });
    this.risks = html("p", { class: "lab-risks" });
    this.status = new Status();
    root.replaceChildren(
      html("div", { class: "lab-controls" }, typing),
      switches,
      html(
        "div",
        { class: "lab-board" },
        html("div", {}, this.map.node, position),
        html("div", {}, this.next, this.risks),
      ),
      this.status.node,
    );
  }

  choose(row) {
    this.row = row;
    this.showRow();
  }

  switches() {
    return { cut: [...this.cut], ordinary: this.ordinary };
  }

  read({ now = false } = {}) {
    const { tokens, unknown } = this.task.encode(this.input.value);
    this.tokens = tokens.slice(0, this.about.config.length);
    this.unknown = [...new Set(unknown)];
    const model = this.model().forward(
      this.tokens,
      1,
      this.tokens.length,
      this.tokens.length,
      this.switches(),
    );
    const labels = this.task.labels(this.tokens);
    const values = Array.from(this.tokens, (_, n) => model.valueNorm(0, n));
    const triggers = this.task.atTriggers(this.tokens);
    this.shown = { labels, triggers, map: model.map(0), values };
    this.slider.max = labels.length - 1;
    this.showRow({ now });
  }

  showRow({ now = false } = {}) {
    const last = this.tokens.length - 1;
    const row = Math.min(this.row ?? last, last);
    this.slider.value = row;
    this.slider.setAttribute("aria-valuetext", this.shown.labels[row]);
    const says = this.inWords(row);
    this.map.show({ ...this.shown, chosen: row, says });
    this.showNext(row);
    this.status.say(says, { now });
  }

  showNext(row) {
    const model = this.model();
    const logits = logSoftmax(model.logitsAt(0, row));
    const current = this.tokens[row];
    const previous = row ? this.tokens[row - 1] : this.task.delimiter;
    const oracle = this.task.oracle(previous, current);
    const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]).slice(0, 8);
    const name = (token) => this.task.labels([token])[0];
    this.expected = name(order[0]);
    const rows = order.map((t) => ({ name: name(t), share: Math.exp(logits[t]), mark: oracle[t] }));
    const rule = this.task.isTrigger[current]
      ? `${name(current)} is a trigger: the language repeats the character before it`
      : "After an ordinary character the language goes on as Shakespeare's letters do";
    this.next.replaceChildren(
      html("p", { class: "lab-title" }, `What it expects after ${name(current)}`),
      shareBars(rows),
      html("p", { class: "lab-small" }, `The line marks the true chance. ${rule}.`),
    );
  }

  /** To be followed by `read`, since the model then holds other texts than the reader's. */
  readRisks() {
    const { length } = this.about.config;
    const found = measure(this.model(), this.task, this.texts, {
      length,
      step: length + 1,
      count: RISK_TEXTS,
      switches: this.switches(),
    });
    this.risks.replaceChildren(
      html("span", { class: "lab-title" }, `Excess risk over ${RISK_TEXTS} texts (nats)`),
      html(
        "span",
        { class: "lab-number" },
        html("b", { class: "backcopy" }, number(found.backcopy)),
        " copying",
      ),
      html(
        "span",
        { class: "lab-number" },
        html("b", { class: "bigram" }, number(found.bigram)),
        " bigrams",
      ),
    );
  }

  inWords(row) {
    const { labels, map, values } = this.shown;
    const weights = map[row];
    const total = weights.reduce((sum, w) => sum + w, 0);
    const most = weights.indexOf(Math.max(...weights));
    const others = usualLength(values);
    const parts = [];
    if (this.unknown.length)
      parts.push(`The language has no ${this.unknown.map((c) => `“${c}”`).join(", ")}; left out.`);
    if (this.cut.has("head")) parts.push("The head is off: what it looks at reaches nobody.");
    if (this.cut.has("mlp")) parts.push("The MLP is off.");
    if (total < 0.005) parts.push(`At ${labels[row]} the head looks at nothing at all.`);
    else {
      const where =
        most === 0
          ? "<s>"
          : most === row
            ? "itself"
            : most === row - 1
              ? `${labels[most]}, the one before`
              : labels[most];
      parts.push(
        `At ${labels[row]} the head looks most at ${where}, with ${number(weights[most])} of its attention.`,
      );
    }
    if (values.length > 1)
      parts.push(`The value of <s> is ${number(values[0] / others)} times as long as the others'.`);
    return parts.join(" ");
  }

  /** Next-token logits after every position of a text, `<s>` in front. */
  logits(text, name, { kernel, ...switches } = {}) {
    const { tokens } = this.task.encode(text);
    const model = this.model(name, kernel).forward(
      tokens,
      1,
      tokens.length,
      tokens.length,
      switches,
    );
    return Array.from(tokens, (_, n) => Array.from(model.logitsAt(0, n)));
  }
}

/** 32-bit floats, little end first, from base64. */
function decodeFloats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
