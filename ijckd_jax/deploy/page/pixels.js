// From a picture to the pixels that the classifiers were trained on.

// The filters by which PIL resizes, and how far from their centres they reach.
const FILTERS = {
  bilinear: {reach: 1, at: (x) => Math.max(0, 1 - Math.abs(x))},
  // Keys' cubic convolution with a = -1/2.
  bicubic: {reach: 2, at: (x) => {
    const d = Math.abs(x);
    if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
    return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
  }},
};

// The weights by which PIL resizes a side: a filter, as wide as the shrinking.
function weights(from, to, {reach, at}) {
  const scale = from / to, width = Math.max(scale, 1), support = reach * width;
  return Array.from({length: to}, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - support + 0.5));
    const last = Math.min(from, Math.floor(centre + support + 0.5));
    const taps = [];
    for (let j = first; j < last; j++) taps.push(at((j - centre + 0.5) / width));
    const sum = taps.reduce((a, b) => a + b, 0);
    return {first, taps: taps.map((x) => x / sum)};
  });
}

// Resizes one side of `pixels` (outer, from, inner), rounding to whole levels.
function resizeSide(pixels, outer, from, inner, to, filter) {
  const made = new Uint8ClampedArray(outer * to * inner);
  weights(from, to, filter).forEach(({first, taps}, i) => {
    for (let o = 0; o < outer; o++) {
      for (let c = 0; c < inner; c++) {
        let sum = 0;
        taps.forEach((weight, k) => {
          sum += weight * pixels[(o * from + first + k) * inner + c];
        });
        made[(o * to + i) * inner + c] = Math.floor(sum + 0.5);
      }
    }
  });
  return made;
}

// Rounds to the nearest whole number, halves to the even one, as Python does.
function round(x) {
  const low = Math.floor(x);
  if (x - low === 0.5) return low % 2 ? low + 1 : low;
  return Math.round(x);
}

// Returns (H, W, C) levels of an opaque picture: resized until it covers
// `crop.resize`, and cut from the centre, as CentreCrop of data/images.py.
export function prepare(rgba, width, height, shape, crop) {
  const [H, W, C] = shape;
  let pixels = new Uint8ClampedArray(width * height * C);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = rgba.subarray(4 * i, 4 * i + 3);
    // Grey as PIL makes it: ITU-R 601's weights in 16 bits.
    if (C === 1) pixels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else pixels.set([r, g, b], 3 * i);
  }
  if (!crop.keeps_size || width !== W || height !== H) {
    const filter = FILTERS[crop.interpolation];
    const scale = Math.max(H / height, W / width) * (crop.resize / H);
    const newWidth = Math.floor(width * scale + 1e-6);
    const newHeight = Math.floor(height * scale + 1e-6);
    pixels = resizeSide(pixels, height, width, C, newWidth, filter);
    pixels = resizeSide(pixels, 1, height, newWidth * C, newHeight, filter);
    const left = round((newWidth - W) / 2), top = round((newHeight - H) / 2);
    const cut = new Uint8ClampedArray(H * W * C);
    for (let y = 0; y < H; y++) {
      const start = ((top + y) * newWidth + left) * C;
      cut.set(pixels.subarray(start, start + W * C), y * W * C);
    }
    pixels = cut;
  }
  return pixels;
}
