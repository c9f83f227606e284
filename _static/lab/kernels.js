// The one matrix product that all of the model is made of, in plain JavaScript and in wasm.
//
// Arrays live in one memory of 32-bit floats. A product is
//     C[i, j] = (add ? C[i, j] : 0) + sum over p of A[i, p] B[p, j],   i < m, j < n, p < k
// where A[i, p] lies at a + i * aRow + p * aColumn, so that A may be transposed, and the rows of B
// and C are bRow and cRow apart. All are counted in floats. n is a multiple of 4: the wasm takes
// four columns at once.

const MEMORY_PAGES = 128; // of 64 KiB: 8 MiB, several times what a model of a page takes

/** The product in plain JavaScript: the base, which every browser has. */
function plainKernel() {
  const floats = new Float32Array(MEMORY_PAGES * 16384);
  const row = new Float64Array(4096);
  function product(a, aRow, aColumn, b, bRow, c, cRow, m, n, k, add) {
    for (let i = 0; i < m; i++) {
      const to = c + i * cRow;
      for (let j = 0; j < n; j++) row[j] = add ? floats[to + j] : 0;
      for (let p = 0; p < k; p++) {
        const factor = floats[a + i * aRow + p * aColumn];
        if (factor === 0) continue;
        const from = b + p * bRow;
        for (let j = 0; j < n; j++) row[j] += factor * floats[from + j];
      }
      for (let j = 0; j < n; j++) floats[to + j] = row[j];
    }
  }
  return { name: "plain", floats, product };
}

/** The same by wasm with SIMD, where the browser has it; else the plain one. */
function fastestKernel() {
  try {
    const module = new WebAssembly.Module(assembleProduct());
    const { memory, product } = new WebAssembly.Instance(module).exports;
    return { name: "wasm", floats: new Float32Array(memory.buffer), product };
  } catch {
    return plainKernel(); // no wasm here, or none with SIMD
  }
}

/**
 * The bytes of the wasm module, put together here instruction by instruction.
 *
 * Function 0 computes one row of C, in strips of sixteen columns and then of four; function 1 the rows one by one. Names
 * of instructions are those of the WebAssembly specification.
 */
function assembleProduct() {
  const i32 = 0x7f;
  const v128 = 0x7b;

  const number = (value) => {
    // LEB128, signed: seven bits a byte, and the last byte tells the sign.
    const bytes = [];
    for (;;) {
      const low = value & 0x7f;
      value >>= 7;
      const last = (value === 0 && !(low & 0x40)) || (value === -1 && low & 0x40);
      bytes.push(last ? low : low | 0x80);
      if (last) return bytes;
    }
  };
  const size = (value) => (value < 128 ? [value] : [(value & 0x7f) | 0x80, ...size(value >> 7)]);
  const vector = (items) => [...size(items.length), ...items.flat()];
  const section = (id, content) => [id, ...size(content.length), ...content];
  const text = (word) => vector([...word].map((letter) => letter.charCodeAt(0)));

  const get = (local) => [0x20, local];
  const set = (local) => [0x21, local];
  const constant = (value) => [0x41, ...number(value)];
  const plus = [0x6a];
  const times = [0x6c];
  const lessThan = [0x48]; // signed
  const greaterThan = [0x4a]; // signed
  const end = [0x0b];
  const asBytes = [0x41, 2, 0x74]; // i32.const 2, i32.shl: floats into bytes
  const simd = (operation) => [0xfd, ...size(operation)];
  const loadFour = (offset) => [...simd(0x00), 2, ...size(offset)]; // v128.load, aligned to 4 bytes
  const storeFour = (offset) => [...simd(0x0b), 2, ...size(offset)]; // v128.store
  const loadSplat = [...simd(0x09), 2, 0]; // v128.load32_splat
  const addFour = simd(0xe4); // f32x4.add
  const timesFour = simd(0xe6); // f32x4.mul
  const zeros = [...simd(0x0c), ...Array(16).fill(0)]; // v128.const
  const advance = (local, ...by) => [...get(local), ...by.flat(), ...plus, ...set(local)];
  const whileLess = (local, limit, ...body) => [
    ...[0x03, 0x40], // loop; at least one turn, since no size is zero
    ...body.flat(),
    ...[...get(local), ...get(limit), ...lessThan, 0x0d, 0], // br_if 0
    ...end,
  ];

  // One row, all arguments in bytes: a, aColumn, b, bRow, c, end of the row of C, k, add.
  const [a, aColumn, b, bRow, c, cEnd, k, add] = [0, 1, 2, 3, 4, 5, 6, 7];
  const [p, at, from, factor] = [8, 9, 10, 11];
  const sums = [12, 13, 14, 15];
  // Columns in strips of four times `sums.length`, as long as there is a whole one left.
  const strips = (sums) => [
    ...[0x02, 0x40, 0x03, 0x40], // block, loop
    ...[...get(c), ...constant(16 * sums.length), ...plus, ...get(cEnd), ...greaterThan],
    ...[0x0d, 1], // br_if 1: out of the block
    ...sums.flatMap((sum, n) => [
      ...[...get(add), 0x04, v128, ...get(c), ...loadFour(16 * n)], // if
      ...[0x05, ...zeros, ...end, ...set(sum)], // else
    ]),
    ...[...constant(0), ...set(p), ...get(a), ...set(at), ...get(b), ...set(from)],
    ...whileLess(
      p,
      k,
      [...get(at), ...loadSplat, ...set(factor)],
      sums.flatMap((sum, n) => [
        ...[...get(sum), ...get(factor), ...get(from), ...loadFour(16 * n)],
        ...[...timesFour, ...addFour, ...set(sum)],
      ]),
      advance(at, get(aColumn)),
      advance(from, get(bRow)),
      advance(p, constant(1)),
    ),
    ...sums.flatMap((sum, n) => [...get(c), ...get(sum), ...storeFour(16 * n)]),
    ...advance(c, constant(16 * sums.length)),
    ...advance(b, constant(16 * sums.length)),
    ...[0x0c, 0, ...end, ...end], // br 0: the next strip
  ];
  const row = [
    ...[2, 3, i32, 5, v128], // locals: p, at, from; factor and sums
    ...strips(sums),
    ...strips(sums.slice(0, 1)),
    ...end,
  ];

  // All rows, arguments in floats as in the plain product.
  const [A, aRow, aCol, B, bStep, C, cRow, m, n, length, adds] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
  const i = 11;
  const cAt = [...get(C), ...get(i), ...get(cRow), ...times, ...plus];
  const rows = [
    ...[1, 1, i32],
    ...whileLess(
      i,
      m,
      [...get(A), ...get(i), ...get(aRow), ...times, ...plus, ...asBytes],
      [...get(aCol), ...asBytes, ...get(B), ...asBytes, ...get(bStep), ...asBytes],
      [...cAt, ...asBytes, ...cAt, ...get(n), ...plus, ...asBytes],
      [...get(length), ...get(adds), 0x10, 0], // call function 0
      advance(i, constant(1)),
    ),
    ...end,
  ];

  const type = (count) => [0x60, ...vector(Array(count).fill(i32)), 0];
  return new Uint8Array([
    ...[0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0], // "\0asm", version 1
    ...section(1, vector([type(8), type(11)])),
    ...section(3, vector([0, 1])),
    ...section(5, vector([[0, ...size(MEMORY_PAGES)]])),
    ...section(
      7,
      vector([
        [...text("memory"), 2, 0],
        [...text("product"), 0, 1],
      ]),
    ),
    ...section(10, vector([row, rows].map((code) => [...size(code.length), ...code]))),
  ]);
}
