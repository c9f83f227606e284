// The Bigram-Backcopy task, as in sinkbook/toy/tasks.py: after an ordinary character the next one
// follows Shakespeare's bigrams, after a trigger the character before the trigger is copied.

/** `statistics` has `symbols`, their `unigrams`, and `bigrams`, counts of who follows whom. */
class Task {
  constructor(statistics, { starts = 1, triggers = 3 } = {}) {
    const { symbols, unigrams, bigrams } = statistics;
    const count = symbols.length;
    this.symbols = [...symbols, ...(starts ? ["<s>"] : []), "<d>"];
    this.vocabSize = this.symbols.length;
    this.start = starts ? count : null;
    this.delimiter = this.vocabSize - 1;
    const byCount = [...unigrams.keys()].sort((a, b) => unigrams[b] - unigrams[a] || a - b);
    this.triggers = byCount.slice(0, triggers);
    this.isTrigger = new Uint8Array(this.vocabSize);
    for (const trigger of this.triggers) this.isTrigger[trigger] = 1;

    // A first character, and what no row is known of: the unigram without the triggers.
    const first = new Float64Array(this.vocabSize);
    unigrams.forEach((times, i) => (first[i] = this.isTrigger[i] ? 0 : times));
    this.transition = this.symbols.map((_, i) => {
      const row = new Float64Array(this.vocabSize);
      const counts = i < count && bigrams[i].some(Boolean) ? bigrams[i] : first;
      const total = counts.reduce((sum, times) => sum + times, 0);
      counts.forEach((times, j) => (row[j] = times / total));
      return row;
    });
    this.cumulative = this.transition.map((row) => {
      let sum = 0;
      return row.map((share) => (sum += share));
    });
  }

  /** `size` texts of `length` + 1 tokens, one after the other. */
  batch(size, length, random) {
    const texts = new Int32Array(size * (length + 1));
    for (let text = 0; text < size; text++) {
      const at = text * (length + 1);
      let previous = this.delimiter;
      let current = this.delimiter; // a text without <s> begins as if it followed one
      for (let n = 0; n <= length; n++) {
        let token;
        if (n === 0 && this.start !== null) token = this.start;
        else if (this.isTrigger[current]) token = previous;
        else token = this.draw(current, random.uniform());
        texts[at + n] = token;
        previous = current;
        current = token;
      }
    }
    return texts;
  }

  draw(row, uniform) {
    const cumulative = this.cumulative[row];
    let low = 0;
    let high = this.vocabSize - 1;
    const wanted = uniform * cumulative[high];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (cumulative[middle] > wanted) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** The true distribution of the token after `current`, which follows `previous`. */
  oracle(previous, current) {
    if (!this.isTrigger[current]) return this.transition[current];
    const row = new Float64Array(this.vocabSize);
    row[previous] = 1;
    return row;
  }

  /** Tokens of a text, `<s>` in front where the task has it, and the characters it does not have. */
  encode(text) {
    const tokens = this.start === null ? [] : [this.start];
    const unknown = [];
    for (const character of text) {
      const token = this.symbols.indexOf(character);
      if (token < 0) unknown.push(character);
      else tokens.push(token);
    }
    return { tokens: Int32Array.from(tokens), unknown };
  }

  /** Where the tokens are triggers. */
  atTriggers(tokens) {
    return Array.from(tokens, (token) => this.isTrigger[token]);
  }

  /** The symbols of tokens, blanks made visible. */
  labels(tokens) {
    return Array.from(tokens, (t) => ({ " ": "␣", "\n": "⏎" })[this.symbols[t]] ?? this.symbols[t]);
  }
}
