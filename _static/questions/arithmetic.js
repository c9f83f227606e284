// Formulas that readers type: arithmetic with numbers, names and lists of numbers. What is read is
// run here, step by step, and never handed to the browser as code.

/** A formula that cannot be read; its message is for the reader. */
class Unreadable extends Error {}

const DEEPEST = 60; // parentheses in each other

const isList = Array.isArray;
const numbersOf = (value) => (isList(value) ? value : [value]);

/** `does` entry by entry, a number against every entry of a list. */
function entrywise(does, a, b) {
  if (!isList(a) && !isList(b)) return does(a, b);
  if (isList(a) && isList(b) && a.length !== b.length)
    throw new Unreadable(`A list of ${a.length} numbers meets one of ${b.length}.`);
  const length = isList(a) ? a.length : b.length;
  const at = (value, n) => (isList(value) ? value[n] : value);
  return Array.from({ length }, (_, n) => does(at(a, n), at(b, n)));
}

const total = (list) => list.reduce((sum, number) => sum + number, 0);

function dot(a, b) {
  if (!isList(a) || !isList(b))
    throw new Unreadable("@ and dot need a list on both sides: they multiply entries and add up.");
  return total(entrywise((x, y) => x * y, a, b));
}

const ofEach = (does) => ({ count: [1], run: (x) => entrywise((a) => does(a), x, 0) });
const ofList = (does) => ({ count: [1], run: (x) => does(numbersOf(x)) });
/** The largest or smallest: of one list, or of two values entry by entry. */
const choosing = (does) => ({
  count: [1, 2],
  run: (x, y) => (y === undefined ? does(...numbersOf(x)) : entrywise((a, b) => does(a, b), x, y)),
});
const mean = (list) => total(list) / list.length;

const FUNCTIONS = new Map(
  Object.entries({
    exp: ofEach(Math.exp),
    log: ofEach(Math.log),
    sqrt: ofEach(Math.sqrt),
    abs: ofEach(Math.abs),
    relu: ofEach((x) => Math.max(x, 0)),
    sigmoid: ofEach((x) => 1 / (1 + Math.exp(-x))),
    sum: ofList(total),
    mean: ofList(mean),
    var: ofList((list) => mean(list.map((x) => (x - mean(list)) ** 2))),
    len: ofList((list) => list.length),
    max: choosing(Math.max),
    min: choosing(Math.min),
    maximum: choosing(Math.max),
    minimum: choosing(Math.min),
    dot: { count: [2], run: dot },
  }),
);
const CONSTANTS = new Map([["pi", Math.PI], ["e", Math.E]]);
// What Python puts in front of a function's name.
const MODULES = new Set(["np", "numpy", "math", "torch"]);
const OPERATORS = new Map([
  ["+", (a, b) => entrywise((x, y) => x + y, a, b)],
  ["-", (a, b) => entrywise((x, y) => x - y, a, b)],
  ["*", (a, b) => entrywise((x, y) => x * y, a, b)],
  ["/", (a, b) => entrywise((x, y) => x / y, a, b)],
  ["@", dot],
  ["**", (a, b) => entrywise((x, y) => x ** y, a, b)],
]);
const AS_TYPED = new Map([["^", "**"], ["−", "-"], ["–", "-"], ["·", "*"], ["×", "*"], ["÷", "/"]]);
const TOKEN = /\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([\p{L}_][\p{L}\p{N}_]*)|(\*\*|[-+*/@^(),.−–·×÷])|(\S))/uy;

/** What a formula is made of: numbers, names and signs, each with its kind and text. */
function tokens(text) {
  const found = [];
  const source = text.trim();
  TOKEN.lastIndex = 0;
  while (TOKEN.lastIndex < source.length) {
    const [, number, name, sign, strange] = TOKEN.exec(source);
    if (strange) throw new Unreadable(`“${strange}” is no part of a formula.`);
    if (number) found.push({ kind: "number", text: number });
    else if (name) found.push({ kind: "name", text: name });
    else found.push({ kind: "sign", text: AS_TYPED.get(sign) ?? sign });
  }
  if (!found.length) throw new Unreadable("Type a formula first.");
  return found;
}

/** Reads a formula in which `names` may stand; `formula` gives a function of their values. */
class Reader {
  constructor(text, names) {
    Object.assign(this, { list: tokens(text), place: 0, depth: 0, names });
  }

  get next() {
    return this.list[this.place];
  }

  isNext(...signs) {
    return this.next?.kind === "sign" && signs.includes(this.next.text);
  }

  take(...signs) {
    return this.isNext(...signs) ? this.list[this.place++].text : null;
  }

  formula() {
    const read = this.sum();
    if (this.isNext(")")) throw new Unreadable("One “)” is too many.");
    if (this.next) throw new Unreadable(`What joins “${this.next.text}” to what is before it?`);
    return read;
  }

  sum() {
    return this.chain(["+", "-"], () => this.product());
  }

  product() {
    return this.chain(["*", "/", "@"], () => this.signed());
  }

  chain(signs, part) {
    let left = part();
    for (let sign = this.take(...signs); sign; sign = this.take(...signs)) {
      const [before, does, after] = [left, OPERATORS.get(sign), part()];
      left = (given) => does(before(given), after(given));
    }
    return left;
  }

  /** A sign binds less than a power: -x**2 is -(x**2). */
  signed() {
    let turned = false;
    for (let sign = this.take("-", "+"); sign; sign = this.take("-", "+")) turned ^= sign === "-";
    const base = this.power();
    return turned ? (given) => entrywise((x) => -x, base(given), 0) : base;
  }

  power() {
    const base = this.methods();
    if (!this.take("**")) return base;
    const exponent = this.nested(() => this.signed());
    const does = OPERATORS.get("**");
    return (given) => does(base(given), exponent(given));
  }

  /** `W.mean()` is `mean(W)`. */
  methods() {
    let value = this.single();
    while (this.take(".")) {
      const name = this.next?.text;
      if (!FUNCTIONS.get(name)?.count.includes(1)) throw this.unknown(name ?? "nothing");
      this.place++;
      if (!this.take("(") || !this.take(")")) throw new Unreadable(`Write .${name}() at its end.`);
      const [before, { run }] = [value, FUNCTIONS.get(name)];
      value = (given) => run(before(given));
    }
    return value;
  }

  single() {
    const token = this.next;
    if (!token) throw new Unreadable("The formula ends too early.");
    this.place++;
    if (token.kind === "number") return () => Number(token.text);
    if (token.kind === "name") return this.named(token.text);
    if (token.text !== "(") throw new Unreadable(`A number or a name is missing before “${token.text}”.`);
    const inner = this.nested(() => this.sum());
    this.close();
    return inner;
  }

  named(name) {
    if (MODULES.has(name) && this.take(".")) {
      const inside = this.next?.text;
      if (!FUNCTIONS.has(inside) && !CONSTANTS.has(inside)) throw this.unknown(inside ?? "nothing");
      this.place++;
      return this.named(inside);
    }
    if (this.names.includes(name)) {
      if (this.isNext("(")) throw new Unreadable(`To multiply, write ${name} * (…).`);
      const index = this.names.indexOf(name);
      return (given) => given[index];
    }
    if (FUNCTIONS.has(name)) return this.call(name);
    if (CONSTANTS.has(name)) return () => CONSTANTS.get(name);
    throw this.unknown(name);
  }

  call(name) {
    if (!this.take("(")) throw new Unreadable(`“${name}” needs parentheses: ${name}(…).`);
    const given = [];
    do given.push(this.nested(() => this.sum()));
    while (this.take(","));
    this.close();
    const { count, run } = FUNCTIONS.get(name);
    if (!count.includes(given.length))
      throw new Unreadable(`“${name}” takes ${count.join(" or ")}, not ${given.length}.`);
    return (values) => run(...given.map((part) => part(values)));
  }

  nested(read) {
    if (++this.depth > DEEPEST) throw new Unreadable("That is too deep: fewer parentheses, please.");
    const found = read();
    this.depth--;
    return found;
  }

  close() {
    if (this.take(")")) return;
    if (this.next) throw new Unreadable(`What joins “${this.next.text}” to what is before it?`);
    throw new Unreadable("A parenthesis is not closed.");
  }

  unknown(name) {
    const known = [...FUNCTIONS.keys()].join(", ");
    return new Unreadable(
      `There is no “${name}” here. There is ${this.names.join(", ")}, and there are ${known}.`,
    );
  }
}

/** A function of a list of values, in the order of `names`; throws `Unreadable`. */
function readFormula(text, names) {
  return new Reader(text, names).formula();
}
