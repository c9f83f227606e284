// A line to type a formula into. It is tried on numbers that came with the page, and so are the
// mistakes that readers make: sinkbook/pages/formulas.py has computed what each should give.

const close = (a, b) => Math.abs(a - b) <= 1e-8 + 1e-5 * Math.abs(b);

function agree(value, truth) {
  if (isList(value) !== isList(truth)) return false;
  const [a, b] = [numbersOf(value), numbersOf(truth)];
  return a.length === b.length && a.every((number, n) => close(number, b[n]));
}

/** A value in so many digits, as in a text. */
function shown(value, digits = 4) {
  if (isList(value)) return `[${value.map((number) => shown(number, digits)).join(", ")}]`;
  if (Number.isNaN(value)) return "no number";
  if (!Number.isFinite(value)) return value > 0 ? "infinity" : "-infinity";
  return String(Number(value.toPrecision(digits)));
}

/** Two values in as few digits as tell them apart. */
function shownApart(yours, truth) {
  const pairs = [4, 6, 9].map((digits) => [shown(yours, digits), shown(truth, digits)]);
  return pairs.find(([a, b]) => a !== b) ?? pairs.at(-1);
}

/** What a formula is told: whether it is right, and in words. */
function judge(text, about) {
  let values;
  try {
    const formula = readFormula(text, about.names);
    values = about.cases.map(({ given }) => formula(given));
  } catch (problem) {
    if (!(problem instanceof Unreadable)) throw problem;
    return { kind: "unread", says: problem.message };
  }
  const wrong = about.cases.findIndex(({ truth }, n) => !agree(values[n], truth));
  if (wrong < 0) return { kind: "right", says: `Right: ${about.right}` };
  const { given, truth } = about.cases[wrong];
  const numbers = about.names.map((name, n) => `${name} = ${shown(given[n])}`).join(", ");
  const [yours, should] = shownApart(values[wrong], truth);
  const hint = about.hints.find((_, k) =>
    about.cases.every(({ mistakes }, n) => agree(values[n], mistakes[k])),
  );
  const says = `Not yet: for ${numbers} yours gives ${yours}, it should be ${should}.`;
  return { kind: "wrong", says: hint ? `${says} ${hint}` : says };
}

function startFormulas() {
  for (const host of document.querySelectorAll(".sinkbook-formula")) {
    const about = JSON.parse(host.querySelector("script[type='application/json']").textContent);
    const [form, says] = [host.querySelector("form"), host.querySelector(".formula-says")];
    const typed = form.querySelector("input");
    host.hidden = false;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const told = judge(typed.value, about);
      host.dataset.answer = told.kind;
      says.textContent = told.says;
      typed.setAttribute("aria-invalid", String(told.kind !== "right"));
    });
    // While it is changed, what was said is about another formula.
    typed.addEventListener("input", () => {
      delete host.dataset.answer;
      says.textContent = "";
      typed.removeAttribute("aria-invalid");
    });
  }
}
