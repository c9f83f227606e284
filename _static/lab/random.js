// Seeded random numbers: the same seed gives the same model and the same texts in every browser.

/** A source of numbers: `uniform()` in [0, 1), `normal()` of mean 0 and variance 1. */
class Random {
  /** `stream` parts what is drawn for one purpose from what is drawn for another. */
  constructor(seed, stream = 0) {
    // sfc32 (Doty-Humphrey), a small fast counter generator that passes PractRand.
    this.state = [0x9e3779b9 ^ stream, 0x243f6a88, seed >>> 0, 1];
    for (let i = 0; i < 15; i++) this.bits();
  }

  bits() {
    const s = this.state;
    const result = (s[0] + s[1] + s[3]) | 0;
    s[3] = (s[3] + 1) | 0;
    s[0] = s[1] ^ (s[1] >>> 9);
    s[1] = (s[2] + (s[2] << 3)) | 0;
    s[2] = (((s[2] << 21) | (s[2] >>> 11)) + result) | 0;
    return result >>> 0;
  }

  uniform() {
    return (this.bits() * 2 ** 21 + (this.bits() >>> 11)) * 2 ** -53;
  }

  normal() {
    // Box and Muller; the second number of a pair is not kept, so that the state is all there is.
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }
}
