// What is drawn: an attention map over the values of its keys, curves, and bars. Colours go by role
// and come from lab.css, so that light and dark mode both hold.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const html = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
const number = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

/** The mean length of the values but the first token's; 0 where it is alone. */
const usualLength = (values) =>
  values.slice(1).reduce((sum, length) => sum + length, 0) / Math.max(values.length - 1, 1);

let names = 0;
const newName = () => `sinkbook-lab-${++names}`;

/** Call `draw` with the width of `host` now and whenever it changes. */
function whenSized(host, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.floor(host.clientWidth);
    if (now && now !== width) draw((width = now));
  }).observe(host);
}

/**
 * An attention map, rows are queries; under each key, the length of its value as the head writes it.
 *
 * `choose(row)` is called when a row is pointed at or touched.
 */
class MapView {
  constructor(choose = null) {
    // What it shows is said as soon as it shows something.
    this.picture = svg("svg", { role: "img", class: "map", "aria-label": "An attention map" });
    this.node = html(
      "div",
      { class: "lab-map" },
      html("p", { class: "lab-title" }, "Where each character looks, a row for each"),
      this.picture,
      html(
        "p",
        { class: "lab-small" },
        html("b", { class: "trigger" }, "Pink"),
        ": triggers repeat the character before.",
      ),
    );
    this.width = 0;
    this.shown = null;
    whenSized(this.node, (width) => {
      this.width = Math.min(width, 400);
      this.made = null;
      if (this.shown) this.show(this.shown);
    });
    if (choose) {
      const at = (event) => {
        const { top, height } = this.picture.getBoundingClientRect();
        const y = ((event.clientY - top) / height) * this.height;
        const row = Math.floor(y / this.cell);
        if (row >= 0 && row < this.shown.labels.length) choose(row);
      };
      this.picture.classList.add("chooses");
      this.picture.addEventListener("pointerdown", at);
      this.picture.addEventListener("pointermove", (event) => {
        if (event.pointerType === "mouse") at(event);
      });
    }
  }

  /** `shown` has `labels`, `triggers` (whether), `map` (rows of weights), `values`, `says`. */
  show(shown) {
    this.shown = shown;
    if (!this.width) return;
    const key = shown.labels.join("\u0000");
    if (this.made !== key) this.make(key);
    const { map, values, says, chosen = null } = shown;
    this.picture.setAttribute("aria-label", says);
    map.forEach((row, n) =>
      row.forEach((weight, j) => {
        this.cells[n][j].setAttribute("fill-opacity", Math.min(weight, 1).toFixed(3));
      }),
    );
    const others = usualLength(values);
    values.forEach((value, n) => {
      const high = Math.min(value / (others || value || 1) / 2, 1) * this.barHeight;
      this.bars[n].setAttribute("y", (this.floor - high).toFixed(1));
      this.bars[n].setAttribute("height", Math.max(high, 0.5).toFixed(1));
    });
    this.frame.setAttribute("visibility", chosen === null ? "hidden" : "visible");
    if (chosen !== null) {
      this.frame.setAttribute("y", chosen * this.cell);
      this.frame.setAttribute("width", (chosen + 1) * this.cell);
    }
  }

  make(key) {
    this.made = key;
    const { labels, triggers } = this.shown;
    const count = labels.length;
    const left = 26;
    this.cell = Math.min((this.width - left) / Math.max(count, 10), 30);
    this.barHeight = 56;
    const side = this.cell * count;
    this.floor = side + 46 + this.barHeight;
    this.height = this.floor + 2;
    const kind = (n) => (labels[n] === "<s>" ? "first" : triggers[n] ? "trigger" : "other");
    const label = (n, x, y, anchor) =>
      svg("text", { x, y, "text-anchor": anchor, class: kind(n) }, labels[n]);
    const place = (n) => left + (n + 0.5) * this.cell;
    this.cells = labels.map((_, n) =>
      labels.slice(0, n + 1).map((_, j) =>
        svg("rect", {
          x: left + j * this.cell,
          y: n * this.cell,
          width: this.cell - 1,
          height: this.cell - 1,
          rx: 2,
          class: "cell",
          "fill-opacity": 0,
        }),
      ),
    );
    this.bars = labels.map((_, n) =>
      svg("rect", {
        x: place(n) - this.cell * 0.35,
        width: this.cell * 0.7,
        y: this.floor,
        height: 0,
        rx: 1,
        class: `bar ${n === 0 ? "first" : kind(n)}`,
      }),
    );
    const ground = this.cells.map((row, n) =>
      svg("rect", {
        x: left,
        y: n * this.cell,
        width: row.length * this.cell - 1,
        height: this.cell - 1,
        rx: 2,
        class: "ground",
      }),
    );
    this.frame = svg("rect", { x: left - 0.5, height: this.cell, rx: 2, class: "frame" });
    const ordinary = this.floor - this.barHeight / 2;
    const line = { x1: left, x2: left + side, y1: ordinary, y2: ordinary, class: "ordinary" };
    const full = left + Math.max(side, this.cell * 10);
    fill(
      this.picture,
      { width: full, height: this.height, viewBox: `0 0 ${full} ${this.height}` },
      [],
    );
    this.picture.replaceChildren(
      ...ground,
      ...this.cells.flat(),
      this.frame,
      ...labels.map((_, n) => label(n, left - 5, (n + 0.5) * this.cell + 4, "end")),
      ...labels.map((_, n) => label(n, place(n), side + 14, "middle")),
      svg(
        "text",
        { x: 0, y: side + 38, class: "title" },
        "How long the value is that it finds there",
      ),
      svg("line", line),
      ...this.bars,
    );
  }
}

/** A number that changes along the steps, as a curve or two under the number as it is now. */
class Curve {
  /** `series` are names of roles, with words if there are several; `guide` is a value to compare. */
  constructor({ title, series, low = 0, high, guide = null, digits = 2 }) {
    Object.assign(this, {
      title,
      series,
      low,
      high,
      guide,
      digits,
      width: 0,
      lines: {},
      before: {},
    });
    this.now = Object.fromEntries(
      series.map(({ key, role }) => [key, html("b", { class: role }, "–")]),
    );
    this.picture = svg("svg", { "aria-hidden": "true" });
    const numbers = series.map(({ key, words }) =>
      html("span", { class: "lab-number" }, this.now[key], words ? ` ${words}` : ""),
    );
    this.node = html(
      "div",
      { class: "lab-curve" },
      html("p", { class: "lab-title" }, title),
      html("p", { class: "lab-numbers" }, ...numbers),
      this.picture,
    );
    whenSized(this.node, (width) => {
      this.width = width;
      this.draw();
    });
  }

  /** `x` goes from 0 to 1; `lines` and `before` have points by key; `at` is where we are. */
  show({ x, lines, before = null, at = x.length - 1 }) {
    Object.assign(this, { x, lines, before, at });
    for (const { key } of this.series) {
      this.now[key].textContent = number(lines[key]?.[at] ?? NaN, this.digits);
    }
    this.draw();
  }

  draw() {
    if (!this.width || !this.x) return;
    const height = 58;
    const points = [this.lines, this.before?.lines ?? {}].flatMap((some) =>
      this.series.flatMap(({ key }) => some[key] ?? []),
    );
    const high = Math.max(
      this.high,
      ...points.filter(Number.isFinite).map((y) => Math.min(y, this.high * 12)),
    );
    const right = this.width - 5;
    const up = (y) =>
      3 +
      (height - 6) * (1 - (Math.min(Math.max(y, this.low), high) - this.low) / (high - this.low));
    const path = (x, y) =>
      y
        .map((value, i) => [x[i], value])
        .filter(([, value]) => Number.isFinite(value))
        .map(
          ([place, value], i) =>
            `${i ? "L" : "M"}${(1 + place * (right - 1)).toFixed(1)} ${up(value).toFixed(1)}`,
        )
        .join("");
    const drawn = [svg("line", { x1: 0, x2: this.width, y1: up(0), y2: up(0), class: "axis" })];
    if (this.guide !== null)
      drawn.push(
        svg("line", {
          x1: 0,
          x2: this.width,
          y1: up(this.guide),
          y2: up(this.guide),
          class: "ordinary",
        }),
      );
    for (const { key, role } of this.series) {
      const was = this.before?.lines[key];
      if (was)
        drawn.push(svg("path", { d: path(this.before.x, was), class: `line before ${role}` }));
    }
    for (const { key, role } of this.series) {
      const values = this.lines[key] ?? [];
      drawn.push(svg("path", { d: path(this.x, values), class: `line ${role}` }));
      if (Number.isFinite(values[this.at]))
        drawn.push(
          svg("circle", {
            cx: 1 + this.x[this.at] * (right - 1),
            cy: up(values[this.at]),
            r: 3.5,
            class: `dot ${role}`,
          }),
        );
    }
    fill(this.picture, { width: this.width, height, viewBox: `0 0 ${this.width} ${height}` }, []);
    this.picture.replaceChildren(...drawn);
  }
}

/** The four curves of a training: sink, drain, sink logit, and the two risks. */
function trainingCurves() {
  return [
    new Curve({
      title: "attention on the first token",
      series: [{ key: "sink", role: "sink" }],
      high: 1,
    }),
    new Curve({
      title: "length of its value ÷ the others'",
      series: [{ key: "drain", role: "drain" }],
      high: 1.5,
      guide: 1,
    }),
    new Curve({
      title: "sink logit",
      series: [{ key: "sinkLogit", role: "sink" }],
      high: 5,
      low: -2,
      digits: 1,
    }),
    new Curve({
      title: "excess risk (nats)",
      series: [
        { key: "backcopy", role: "backcopy", words: "copying" },
        { key: "bigram", role: "bigram", words: "bigrams" },
      ],
      high: 4,
    }),
  ];
}

/** The map beside the curves. */
function board(map, curves) {
  return html(
    "div",
    { class: "lab-board" },
    map.node,
    html("div", { class: "lab-curves" }, ...curves.map((curve) => curve.node)),
  );
}

/** Numbers from 0 to 1 by name, as rows of bars; `mark` is what they should be. */
function shareBars(rows) {
  return html(
    "ol",
    { class: "lab-shares" },
    ...rows.map(({ name, share, mark }) =>
      html(
        "li",
        {},
        html("span", { class: "name" }, name),
        html(
          "span",
          { class: "track", "aria-hidden": "true" },
          html("span", { class: "share", style: `width: ${(100 * share).toFixed(1)}%` }),
          html("span", { class: "truth", style: `left: ${(100 * mark).toFixed(1)}%` }),
        ),
        html("span", { class: "value" }, number(share)),
      ),
    ),
  );
}

/** One of several words, as a group of radio buttons; `change(value)` when another is taken. */
function choice(title, options, value, change) {
  const name = newName();
  return html(
    "fieldset",
    { class: "lab-choice" },
    html("legend", {}, title),
    html(
      "span",
      { class: "lab-pills" },
      ...options.map(([key, words]) =>
        html(
          "label",
          {},
          html("input", {
            type: "radio",
            name,
            value: key,
            checked: key === value,
            onchange: () => change(key),
          }),
          html("span", {}, words),
        ),
      ),
    ),
  );
}

/** One of many, as a drop-down list. */
function selection(title, options, value, change) {
  const list = html(
    "select",
    { onchange: () => change(list.value) },
    ...options.map(([key, words]) =>
      html("option", { value: key, selected: String(key) === String(value) }, words),
    ),
  );
  return html("label", { class: "lab-choice" }, html("span", {}, title), list);
}

/** A switch that is on or off. */
function toggle(title, value, change) {
  const box = html("input", {
    type: "checkbox",
    role: "switch",
    checked: value,
    onchange: () => change(box.checked),
  });
  return html("label", { class: "lab-switch" }, box, html("span", {}, title));
}

/** A sentence that is always there to read, and read aloud no more often than one can listen. */
class Status {
  constructor() {
    this.seen = html("p", { class: "lab-says", "aria-hidden": "true" });
    this.heard = html("p", { class: "lab-heard", role: "status", "aria-live": "polite" });
    this.node = html("div", {}, this.seen, this.heard);
    this.last = 0;
  }

  say(words, { now = false } = {}) {
    this.seen.textContent = words;
    clearTimeout(this.timer);
    const wait = now ? 0 : this.last + 2500 - performance.now();
    const change = () => {
      this.last = performance.now();
      if (this.heard.textContent !== words) this.heard.textContent = words;
    };
    if (wait <= 0) change();
    else this.timer = setTimeout(change, wait);
  }
}
