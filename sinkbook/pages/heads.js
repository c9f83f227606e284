// Every head of a model on short texts: a tile for each, and one of them large. heads.py makes the
// data: for each text its tokens, and the maps and value norms of all heads in bytes.
(() => {
  "use strict";

  // From no attention to all of it.
  const RAMPS = {
    light: [[238, 242, 247], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]],
    dark: [[36, 42, 50], [30, 68, 104], [42, 112, 168], [104, 174, 230], [218, 238, 255]],
  };
  const NARROWEST = 18; // pixels of a tile where a pointer finds it; fingers need more
  const FOR_FINGERS = 26;
  const LEFT = 18; // pixels left of the tiles, for the heads' numbers
  const LISTED = 5; // tokens that most heads look at
  let viewers = 0;

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  function colourOf(share, ramp) {
    const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
    const lower = Math.min(Math.floor(place), ramp.length - 2);
    return ramp[lower].map((from, channel) =>
      Math.round(from + (place - lower) * (ramp[lower + 1][channel] - from)));
  }

  const luminance = (colour) => {
    const [r, g, b] = colour.map((channel) => {
      const part = channel / 255;
      return part <= 0.04 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };

  const css = ([r, g, b]) => `rgb(${r}, ${g}, ${b})`;

  // Black or white, whichever can be read on a colour.
  const readableOn = (colour) => (luminance(colour) > 0.18 ? "#000" : "#fff");

  async function unpack(text, heads) {
    const packed = Uint8Array.from(atob(text.packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    const count = text.tokens.length;
    const size = (count * (count + 1)) / 2;
    return {
      count,
      tokens: text.tokens,
      weight: (head, query, key) =>
        key > query ? 0 : bytes[head * size + (query * (query + 1)) / 2 + key] / 255,
      value: (head, key) => (text.scales[head] * bytes[heads * size + head * count + key]) / 255,
      valued: text.scales.length > 0,
      largest: Math.max(...text.scales),
    };
  }

  class Viewer {
    constructor(root, data) {
      this.root = root;
      this.data = data;
      this.heads = data.heads; // [layer, head] of each
      this.at = new Map(this.heads.map(([layer, head], index) => [`${layer},${head}`, index]));
      this.layers = 1 + Math.max(...this.heads.map(([layer]) => layer));
      this.rows = 1 + Math.max(...this.heads.map(([, head]) => head));
      const [name, head] = data.opens;
      this.chosen = { text: data.texts.findIndex((text) => text.name === name), head, token: null };
      this.pointed = { head: null, token: null, cell: null }; // what a mouse is over
    }

    get head() { return this.pointed.head ?? this.chosen.head; }
    get token() { return this.pointed.token ?? this.chosen.token; }

    async start() {
      await this.open(this.chosen.text);
      this.build();
      const again = () => this.paint();
      const watched = { attributes: true, attributeFilter: ["data-theme", "data-jp-theme-light"] };
      for (const place of [document.documentElement, document.body]) {
        new MutationObserver(again).observe(place, watched);
      }
      new ResizeObserver(() => this.layOut()).observe(this.root);
      this.layOut();
      this.reveal();
    }

    async open(number) {
      const text = this.data.texts[number];
      text.opened ??= await unpack(text, this.heads.length);
      this.text = text.opened;
    }

    // --- What there is on the page -------------------------------------------------------------

    build() {
      const { root } = this;
      this.live = element("p", { class: "unseen", role: "status" });
      this.tiles = element("canvas", { "aria-hidden": "true" });
      this.hint = element("p", { class: "note" });
      this.scale = element("i");
      this.box = element("div", { class: "box" },
        element("div", { class: "field" }, this.tiles, this.grid(), this.layerNumbers()));
      this.queries = element("div", { class: "queries", "aria-hidden": "true" });
      this.map = element("canvas", { role: "img" });
      this.bars = element("canvas", { class: "bars", "aria-hidden": "true" });
      this.keys = element("div", { class: "keys", "aria-hidden": "true" });
      this.title = element("p", { class: "title" });
      this.says = element("p", { class: "says" });
      this.tokens = element("div", {
        class: "tokens", role: "toolbar",
        "aria-label": "Tokens of the text: choose one to see where all heads look from it",
      });
      this.most = element("div", { class: "most" });
      this.values = element("div", { class: "values" }, "value");
      root.querySelector(".still").remove();
      root.append(
        this.choices(), this.tokens,
        element("p", { class: "note" }, "The stronger its colour, the more the chosen head looks at a "
          + "token. Choose one to see where all heads look from there."),
        this.box,
        element("div", { class: "under" }, this.hint,
          element("p", { class: "note scale" }, "no attention", this.scale, "all of it")),
        element("div", { class: "below" },
          element("div", { class: "map" },
            this.queries, this.map, this.values, this.bars, this.keys),
          element("div", { class: "about" }, this.title, this.says, this.most)),
        this.live);
      this.listen();
      this.name();
    }

    choices() {
      const name = `sinkbook-heads-${(viewers += 1)}`;
      const labels = this.data.texts.map((text, number) => {
        const input = element("input", { type: "radio", name, value: text.name });
        input.checked = number === this.chosen.text;
        input.addEventListener("change", async () => {
          await this.open(number);
          this.chosen = { ...this.chosen, text: number, token: null };
          this.pointed = { head: null, token: null, cell: null };
          this.name();
          this.paint();
          this.tell();
        });
        return element("label", {}, input, text.name);
      });
      const legend = element("legend", { class: "unseen" }, "Text that the model reads");
      return element("fieldset", {}, legend, ...labels);
    }

    grid() {
      this.buttons = [];
      const rows = Array.from({ length: this.rows }, (_, head) => {
        const row = element("div", { class: "row", role: "row" },
          element("span", { "aria-hidden": "true" }, `${head}`));
        for (let layer = 0; layer < this.layers; layer += 1) {
          const index = this.at.get(`${layer},${head}`);
          if (index === undefined) row.append(element("i"));
          else {
            this.buttons[index] = element("button", { type: "button", role: "gridcell" });
            row.append(this.buttons[index]);
          }
        }
        return row;
      });
      const label = "All heads: a column for each layer, a row for each head of it";
      this.rowsOfTiles = element("div", { role: "grid", "aria-label": label }, ...rows);
      return this.rowsOfTiles;
    }

    layerNumbers() {
      const numbers = Array.from({ length: this.layers }, (_, layer) => element("span", {}, `${layer}`));
      const corner = element("span", { class: "corner" });
      return element("div", { class: "layers", "aria-hidden": "true" }, corner, ...numbers);
    }

    // Names of tokens and heads on a new text.
    name() {
      const { text } = this;
      const words = text.tokens.map((token) => token.trim());
      const labels = (choose) => words.map((word, token) => {
        const label = element("span", {}, word);
        if (choose) this.pointable(label, token);
        return label;
      });
      this.queries.replaceChildren(...labels(true));
      this.keys.replaceChildren(...labels(false));
      this.tokens.replaceChildren(...text.tokens.map((token, number) => {
        const begins = token.startsWith(" ") ? "begins" : "";
        const button = element("button", { type: "button", class: begins }, words[number]);
        this.pointable(button, number);
        return button;
      }));
      this.buttons.forEach((button, index) => {
        const [layer, head] = this.heads[index];
        const resting = this.onFirst(index).toFixed(2);
        button.setAttribute("aria-label",
          `layer ${layer}, head ${head}: ${resting} on the first token`);
      });
      const shown = text.valued ? "" : "none";
      this.values.style.display = shown;
      this.bars.style.display = shown;
    }

    pointable(label, token) {
      label.addEventListener("pointerenter", (event) => {
        if (event.pointerType === "mouse") this.point({ token });
      });
      label.addEventListener("pointerleave", () => this.point({ token: null }));
      label.addEventListener("click", () => {
        this.choose({ token: this.chosen.token === token ? null : token });
      });
    }

    // --- What a reader does --------------------------------------------------------------------

    listen() {
      this.buttons.forEach((button, head) => {
        button.addEventListener("pointerenter", (event) => {
          if (event.pointerType === "mouse") this.point({ head });
        });
        button.addEventListener("click", () => this.choose({ head }));
      });
      this.rowsOfTiles.addEventListener("pointerleave", () => this.point({ head: null }));
      this.rowsOfTiles.addEventListener("keydown", (event) => this.stepHead(event));
      this.tokens.addEventListener("keydown", (event) => this.stepToken(event));
      const cell = (event) => {
        const { left, top, width, height } = this.map.getBoundingClientRect();
        const { count } = this.text;
        const key = Math.min(count - 1, Math.floor(((event.clientX - left) / width) * count));
        const query = Math.min(count - 1, Math.floor(((event.clientY - top) / height) * count));
        this.point({ cell: key <= query && Math.min(key, query) >= 0 ? [query, key] : null });
      };
      this.map.addEventListener("pointermove", cell);
      this.map.addEventListener("pointerdown", cell);
      this.map.addEventListener("pointerleave", (event) => {
        if (event.pointerType === "mouse") this.point({ cell: null });
      });
      this.root.addEventListener("keydown", (event) => {
        if (event.key === "Escape" && this.chosen.token !== null) this.choose({ token: null });
      });
    }

    point(what) {
      this.pointed = { ...this.pointed, ...what };
      this.paint();
    }

    choose(what) {
      this.chosen = { ...this.chosen, ...what };
      this.pointed = { head: null, token: null, cell: null };
      this.paint();
      this.tell();
    }

    stepHead(event) {
      const steps = {
        ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
        Home: [-1, 0], End: [1, 0],
      };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [right, down] = steps[event.key];
      let [layer, head] = this.heads[this.chosen.head];
      let found = this.chosen.head;
      do {
        layer += right;
        head += down;
        const index = this.at.get(`${layer},${head}`);
        if (index !== undefined) {
          found = index;
          if (event.key.startsWith("Arrow")) break;
        }
      } while (layer >= 0 && head >= 0 && layer < this.layers && head < this.rows);
      this.choose({ head: found });
      this.buttons[found].focus({ preventScroll: true });
      this.reveal();
    }

    stepToken(event) {
      const { count } = this.text;
      const { token } = this.chosen;
      const next = {
        ArrowLeft: Math.max(0, (token ?? 1) - 1), ArrowRight: Math.min(count - 1, (token ?? -1) + 1),
        Home: 0, End: count - 1,
      }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      this.choose({ token: next });
      this.tokens.children[next].focus();
    }

    // Bring the chosen tile into view, in its box and not on the page.
    reveal() {
      const place = this.buttons[this.chosen.head].offsetLeft + this.pitch / 2;
      const { scrollLeft, clientWidth } = this.box;
      if (place < scrollLeft + 2 * LEFT + this.pitch || place > scrollLeft + clientWidth - this.pitch) {
        this.box.scrollLeft = place - clientWidth / 2;
      }
    }

    // --- What is shown -------------------------------------------------------------------------

    // Mean attention of later tokens on the first one.
    onFirst(head) {
      let sum = 0;
      for (let query = 1; query < this.text.count; query += 1) sum += this.text.weight(head, query, 0);
      return sum / (this.text.count - 1);
    }

    // The key that a token looks at most.
    favourite(head, query) {
      let best = 0;
      for (let key = 1; key <= query; key += 1) {
        if (this.text.weight(head, query, key) > this.text.weight(head, query, best)) best = key;
      }
      return best;
    }

    layOut() {
      const width = this.root.clientWidth - LEFT - 4;
      if (width <= 0) return;
      const fitting = Math.min(40, Math.floor(width / this.layers));
      this.pitch = fitting >= NARROWEST ? fitting : FOR_FINGERS;
      this.box.style.setProperty("--pitch", `${this.pitch}px`);
      this.box.style.setProperty("--left", `${LEFT}px`);
      this.paint();
    }

    paint() {
      if (!this.pitch) return;
      const paper = getComputedStyle(this.root).backgroundColor.match(/[\d.]+/g).map(Number);
      this.ramp = luminance(paper.slice(0, 3)) < 0.2 ? RAMPS.dark : RAMPS.light;
      const stops = this.ramp.map(css).join(", ");
      this.scale.style.background = `linear-gradient(to right, ${stops})`;
      this.paintTiles();
      this.paintMap();
      this.paintValues();
      this.write();
    }

    paintTiles() {
      const { text, token, pitch } = this;
      const sharp = window.devicePixelRatio || 1;
      const side = Math.round(pitch * sharp);
      const inner = side - Math.max(2, Math.round(2 * sharp));
      const { tiles } = this;
      tiles.width = side * this.layers;
      tiles.height = side * this.rows;
      tiles.style.width = `${pitch * this.layers}px`;
      tiles.style.height = `${pitch * this.rows}px`;
      const colours = Array.from({ length: 256 }, (_, level) => colourOf(level / 255, this.ramp));
      const context = tiles.getContext("2d");
      const image = context.createImageData(tiles.width, tiles.height);
      const cells = Array.from({ length: inner }, (_, pixel) =>
        Math.floor((pixel * text.count) / inner));
      const margin = Math.floor((side - inner) / 2);
      this.heads.forEach(([layer, row], head) => {
        for (let y = 0; y < inner; y += 1) {
          const query = token ?? cells[y];
          const start = (row * side + margin + y) * tiles.width + layer * side + margin;
          for (let x = 0; x < inner && cells[x] <= query; x += 1) {
            const level = Math.round(255 * text.weight(head, query, cells[x]));
            image.data.set([...colours[level], 255], 4 * (start + x));
          }
        }
      });
      context.putImageData(image, 0, 0);
    }

    // A canvas of some height for as many columns as there are tokens, and its measures.
    canvas(canvas, height) {
      const sharp = window.devicePixelRatio || 1;
      const width = canvas.clientWidth;
      canvas.width = Math.round(width * sharp);
      canvas.height = Math.round((height ?? width) * sharp);
      canvas.style.height = `${height ?? width}px`;
      const { count } = this.text;
      const edges = Array.from({ length: count + 1 }, (_, n) => Math.round((n * canvas.width) / count));
      return { context: canvas.getContext("2d"), edges, height: canvas.height, gap: Math.round(sharp) };
    }

    paintMap() {
      const { text, head, token } = this;
      const { context, edges, gap } = this.canvas(this.map);
      const cell = this.pointed.cell;
      for (let query = 0; query < text.count; query += 1) {
        context.globalAlpha = token === null || token === query ? 1 : 0.35;
        for (let key = 0; key <= query; key += 1) {
          context.fillStyle = css(colourOf(text.weight(head, query, key), this.ramp));
          context.fillRect(edges[key], edges[query],
            edges[key + 1] - edges[key] - gap, edges[query + 1] - edges[query] - gap);
        }
      }
      context.globalAlpha = 1;
      if (cell) {
        const [query, key] = cell;
        context.strokeStyle = getComputedStyle(this.root).color;
        context.lineWidth = 2 * gap;
        context.strokeRect(edges[key], edges[query],
          edges[key + 1] - edges[key] - gap, edges[query + 1] - edges[query] - gap);
      }
      const row = cell ? cell[0] : token;
      [...this.queries.children].forEach((label, n) => label.classList.toggle("on", n === row));
      [...this.keys.children].forEach((label, n) => label.classList.toggle("on", cell?.[1] === n));
      const list = text.tokens.slice(1).map((word, before) => {
        const key = this.favourite(head, before + 1);
        return `${word.trim()} → ${text.tokens[key].trim()} `
          + text.weight(head, before + 1, key).toFixed(2);
      });
      const [layer, number] = this.heads[head];
      this.map.setAttribute("aria-label", `Attention map of layer ${layer}, head ${number}. `
        + `Each token, what it looks at most, and how much: ${list.join("; ")}.`);
    }

    paintValues() {
      const { text, head } = this;
      if (!text.valued) return;
      const { context, edges, height, gap } = this.canvas(this.bars, 44);
      const style = getComputedStyle(this.root);
      const norms = Array.from({ length: text.count }, (_, key) => text.value(head, key));
      const top = 1.05 * Math.max(2, ...norms);
      context.clearRect(0, 0, edges.at(-1), height);
      norms.forEach((norm, key) => {
        const tall = Math.max(gap, Math.round((norm / top) * (height - 2)));
        context.fillStyle = style.getPropertyValue(key ? "--muted" : "--drain");
        context.globalAlpha = key ? 0.55 : 1;
        context.fillRect(edges[key], height - tall, edges[key + 1] - edges[key] - 2 * gap, tall);
      });
      context.globalAlpha = 1;
      context.fillStyle = style.color;
      context.fillRect(0, Math.round(height - (height - 2) / top), edges.at(-1), gap);
    }

    write() {
      const { text, head, token } = this;
      const [layer, number] = this.heads[head];
      this.root.dataset.layer = layer;
      this.root.dataset.head = number;
      this.root.dataset.text = this.data.texts[this.chosen.text].name;
      this.root.dataset.token = token ?? "";
      this.title.textContent = `Layer ${layer}, head ${number}`;
      this.says.textContent = this.sentence();
      this.hint.textContent = token === null
        ? "A triangle is a head: its rows look, its columns are looked at. Point, tap, or use the "
          + "arrow keys."
        : `A square is a head: its stripes are what it looks at from ${this.word(token)}.`;
      this.buttons.forEach((button, index) => {
        const on = index === this.chosen.head;
        button.setAttribute("aria-selected", on);
        button.tabIndex = on ? 0 : -1;
      });
      [...this.tokens.children].forEach((button, key) => {
        const hidden = token !== null && key > token;
        const colour = colourOf(hidden ? 0 : this.drawn(key), this.ramp);
        button.style.background = hidden ? "none" : css(colour);
        button.style.color = hidden ? "" : readableOn(colour);
        button.classList.toggle("from", key === token);
        button.setAttribute("aria-pressed", key === this.chosen.token);
        button.tabIndex = key === (this.chosen.token ?? 0) ? 0 : -1;
      });
      this.most.replaceChildren(...this.listed());
    }

    // What a token gets from the one that is chosen, or from all that see it.
    drawn(key) {
      const { text, head, token } = this;
      if (token !== null) return text.weight(head, token, key);
      let sum = 0;
      for (let query = key; query < text.count; query += 1) sum += text.weight(head, query, key);
      return sum / (text.count - key);
    }

    sentence() {
      const { text, head, token } = this;
      const word = (number) => this.word(number);
      if (this.pointed.cell) {
        const [query, key] = this.pointed.cell;
        return `${word(query)} gives ${word(key)} ${text.weight(head, query, key).toFixed(2)} `
          + "of its attention.";
      }
      if (token !== null) {
        const key = this.favourite(head, token);
        return `From ${word(token)} this head looks most at `
          + `${key === token ? "itself" : word(key)}: ${text.weight(head, token, key).toFixed(2)}.`;
      }
      const drained = text.valued
        ? ` The value norm of the first is ${text.value(head, 0).toFixed(2)} times the mean of the `
          + "others’." : "";
      return `Later tokens give the first one ${this.onFirst(head).toFixed(2)} of their attention, `
        + `on average.${drained}`;
    }

    // How many of all heads look most at which token, from the one that is chosen.
    counts() {
      const { text, token } = this;
      const counts = new Array(text.count).fill(0);
      this.heads.forEach((_, head) => { counts[this.favourite(head, token)] += 1; });
      return counts.map((count, key) => [count, key]).filter(([count]) => count)
        .sort(([a, first], [b, second]) => b - a || first - second);
    }

    nameFrom(key) {
      return key === this.token ? "itself" : `${this.text.tokens[key].trim()}${this.place(key)}`;
    }

    word(number) {
      return `“${this.text.tokens[number].trim()}”${this.place(number)}`;
    }

    // Which of the text's tokens, where one of the same name is among them.
    place(number) {
      const name = (token) => token.trim();
      const { tokens } = this.text;
      const alone = tokens.filter((token) => name(token) === name(tokens[number])).length === 1;
      return alone ? "" : ` (${number + 1})`;
    }

    listed() {
      if (this.token === null) return [];
      const counts = this.counts();
      const rows = counts.slice(0, LISTED).flatMap(([count, key]) => {
        const bar = element("i");
        bar.style.width = `${(100 * count) / this.heads.length}%`;
        return [element("dt", {}, this.nameFrom(key)), element("dd", {}, bar),
          element("dd", {}, `${count}`)];
      });
      const rest = counts.length - LISTED;
      const more = rest > 0 ? [element("p", { class: "note" },
        `and ${rest} other token${rest > 1 ? "s" : ""}`)] : [];
      return [element("p", {}, `What all ${this.heads.length} heads look at most from there:`),
        element("dl", {}, ...rows), ...more];
    }

    // What was chosen, for those who listen.
    tell() {
      const all = this.token === null ? "" : ` Of all ${this.heads.length} heads, `
        + this.counts().slice(0, LISTED).map(([count, key]) =>
          `${count} look most at ${this.nameFrom(key)}`).join(", ") + ".";
      this.live.textContent = `${this.title.textContent}, ${this.root.dataset.text}. `
        + `${this.sentence()}${all}`;
    }
  }

  for (const root of document.querySelectorAll(".sinkbook-heads:not([data-started])")) {
    root.dataset.started = "";
    if (typeof DecompressionStream === "undefined") continue; // the still picture stays
    const viewer = new Viewer(root, JSON.parse(root.querySelector("script").textContent));
    root.viewer = viewer;
    viewer.start();
  }
})();
