// What is measured of a model, with the definitions of sinkbook/toy/measurements.py.

/**
 * Sink, drain, sink logit and the two risks on texts, inputs of `length` tokens `step` apart.
 *
 * The sink token is position 0. Its own query, and keys that a query cannot see, never count.
 * `sinkLogit` is the mean over kinds of query, as the paper has it.
 */
function measure(model, task, texts, { length, step, count, switches = {} }) {
  const sums = newSums(task);
  for (let from = 0; from < count; from += model.texts) {
    const some = Math.min(model.texts, count - from);
    const tokens = texts.subarray(from * step);
    model.forward(tokens, some, length, step, switches);
    for (let text = 0; text < some; text++) {
      for (let n = 0; n < length; n++) addQuery(sums, model, task, tokens, text, n);
    }
  }
  const kinds = sums.logits.filter((kind) => kind.count);
  return {
    sink: sums.sink.mean(),
    sinkTriggers: sums.sinkTriggers.mean(),
    drain: sums.firstValue.mean() / sums.otherValue.mean(),
    sinkLogit: kinds.reduce((sum, kind) => sum + kind.mean() / kinds.length, 0),
    backcopy: sums.backcopy.mean(),
    bigram: sums.bigram.mean(),
  };
}

class Mean {
  count = 0;
  sum = 0;
  add(value) {
    this.count++;
    this.sum += value;
  }
  mean() {
    return this.sum / this.count;
  }
}

function newSums(task) {
  const names = ["sink", "sinkTriggers", "firstValue", "otherValue", "backcopy", "bigram"];
  const sums = Object.fromEntries(names.map((name) => [name, new Mean()]));
  sums.logits = task.symbols.map(() => new Mean());
  return sums;
}

function addQuery(sums, model, task, tokens, text, n) {
  const { H, length, step } = model;
  const at = text * step + n;
  const token = tokens[at];
  const isTrigger = task.isTrigger[token];
  const excess = excessRisk(
    task,
    model.logitsAt(text, n),
    n ? tokens[at - 1] : task.delimiter,
    token,
  );
  (isTrigger ? sums.backcopy : sums.bigram).add(excess);
  if (n === 0) {
    sums.firstValue.add(model.valueNorm(text, 0));
    return;
  }
  const row = (text * length + n) * padded(length);
  (isTrigger ? sums.sinkTriggers : sums.sink).add(H[model.weights + row]);
  if (isTrigger) return;
  sums.otherValue.add(model.valueNorm(text, n));
  let others = 0;
  for (let j = 1; j <= n; j++) others += H[model.scores + row + j] / n;
  if (token < task.symbols.length - 1 && token !== task.start)
    sums.logits[token].add(H[model.scores + row] - others);
}

/** Cross-entropy of the oracle's next token minus the oracle's own entropy, in nats. */
function excessRisk(task, logits, previous, token) {
  const oracle = task.oracle(previous, token);
  const log = logSoftmax(logits);
  let risk = 0;
  for (let i = 0; i < oracle.length; i++) {
    if (oracle[i] > 0) risk += oracle[i] * (Math.log(oracle[i]) - log[i]);
  }
  return risk;
}

function logSoftmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const sum = logits.reduce((total, x) => total + Math.exp(x - largest), 0);
  return Float64Array.from(logits, (x) => x - largest - Math.log(sum));
}
