// Slide through training: the steps that the page's own run recorded, map and curves together.

class RecordedLab {
  /**
   * `about` has `steps`, `labels`, `triggers`, `maps` (bytes: the lower triangles, 255 is 1),
   * `values` and the curves, all by recorded step.
   */
  constructor(root, about) {
    Object.assign(this, { root, about, at: about.steps.length - 1 });
    this.maps = Uint8Array.from(atob(about.maps), (letter) => letter.charCodeAt(0));
    this.build();
    this.show({ now: true });
  }

  build() {
    const { about, root } = this;
    this.slider = html("input", {
      type: "range",
      min: 0,
      max: about.steps.length - 1,
      value: this.at,
      oninput: () => {
        this.at = +this.slider.value;
        this.halt();
      },
    });
    this.count = html("span", { class: "lab-count" });
    this.button = html("button", { type: "button", class: "lab-main", onclick: () => this.play() });
    this.map = new MapView();
    this.curves = trainingCurves();
    this.status = new Status();
    root.replaceChildren(
      html(
        "div",
        { class: "lab-controls" },
        this.button,
        html("label", { class: "lab-slide" }, html("span", {}, "step"), this.slider),
        this.count,
      ),
      board(this.map, this.curves),
      this.status.node,
    );
  }

  /** Through all steps in about eight seconds, or, where calm is asked for, one on. */
  play() {
    if (this.timer) return this.halt();
    const last = this.about.steps.length - 1;
    if (this.at >= last) this.at = -1;
    const on = () => {
      this.at++;
      if (this.at >= last || calm()) this.halt();
      this.show();
    };
    if (!calm()) this.timer = setInterval(on, 8000 / last);
    on();
  }

  halt() {
    clearInterval(this.timer);
    this.timer = null;
    this.show();
  }

  show({ now = false } = {}) {
    const { about, at } = this;
    const step = about.steps[at];
    this.slider.value = at;
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    this.count.textContent = `step ${step} of ${about.steps.at(-1)}`;
    this.button.textContent = this.timer ? "Stop" : calm() ? "Next" : "Play";
    const count = about.labels.length;
    let from = (at * count * (count + 1)) / 2;
    const map = about.labels.map((_, n) =>
      Array.from(this.maps.subarray(from, (from += n + 1)), (b) => b / 255),
    );
    const says = this.inWords(at);
    this.map.show({
      labels: about.labels,
      triggers: about.triggers,
      map,
      values: about.values[at],
      says,
    });
    const x = about.steps.map((_, n) => n / (about.steps.length - 1));
    for (const curve of this.curves) curve.show({ x, lines: about.curves, at });
    this.status.say(says, { now });
  }

  inWords(at) {
    const { steps, curves } = this.about;
    return (
      `At step ${steps[at]} ordinary characters give <s> ${number(curves.sink[at])} of their attention; its value is ` +
      `${number(curves.drain[at])} times as long as the others'. Excess risk of copying ` +
      `${number(curves.backcopy[at])}, of bigrams ${number(curves.bigram[at])} nats. Steps are close together at first.`
    );
  }
}
