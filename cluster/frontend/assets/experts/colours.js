// Colours of the heat map. Sequential scales go through OKLab, so equal steps look equal and
// lightness alone tells them apart: nobody needs to see hues. Both begin near the page's ground.

const LIGHT = ["#edf3f3", "#c3e3d6", "#7cc7c3", "#3a9dbb", "#2468a6", "#232f7c", "#170f3f"];
const DARK = ["#1d2a35", "#173f5c", "#14687e", "#1f9487", "#6abd72", "#c6dd5a", "#fdf7b0"];
// Okabe and Ito's, which the colour blind tell apart; further workers get lighter, darker turns.
const WORKERS = [
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#d55e00",
  "#b8a800",
  "#8a6fc2",
];
const TURNS = [0, 0.13, -0.13, 0.22, -0.22];
const NUM_STEPS = 256;

/** Packed pixels from nothing to the top of a scale. */
export function rampOf(isDark) {
  const stops = (isDark ? DARK : LIGHT).map(toLab);
  return Uint32Array.from({ length: NUM_STEPS }, (_, step) => {
    const place = (step / (NUM_STEPS - 1)) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return pixel(mix(stops[low], stops[low + 1], place - low));
  });
}

/** The packed pixel of a share 0..1 of the scale. */
export function shade(pixels, share) {
  return pixels[Math.min(NUM_STEPS - 1, Math.max(0, Math.round(share * (NUM_STEPS - 1))))];
}

/** The packed pixel of a worker by its position among all workers. */
export function workerPixel(position) {
  const [lightness, a, b] = toLab(WORKERS[position % WORKERS.length]);
  const turn = TURNS[Math.floor(position / WORKERS.length) % TURNS.length];
  return pixel([lightness + turn, a, b]);
}

/** A packed pixel as CSS. */
export function css(packed) {
  return `rgb(${packed & 255} ${(packed >> 8) & 255} ${(packed >> 16) & 255})`;
}

/** The packed pixel of "rgb(r, g, b)". */
export function pixelOf(colour) {
  return pack(...colour.match(/\d+/g).slice(0, 3).map(Number));
}

/** `share` of the way from one packed pixel to another. */
export function blend(from, to, share) {
  const at = (shift) => {
    const low = (from >> shift) & 255;
    return Math.round(low + (((to >> shift) & 255) - low) * share);
  };
  return pack(at(0), at(8), at(16));
}

/** The smallest round number that is not below `value` and at least 1. */
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return (
    power * [1, 1.5, 2, 3, 5, 7, 10].find((step) => step * power >= Math.max(value, 1) * 0.999)
  );
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

const pack = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

const mix = (from, to, share) => from.map((value, i) => value + (to[i] - value) * share);

function toLab(hex) {
  const [red, green, blue] = channels(hex).map((value) => {
    const c = value / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  const l = Math.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue);
  const m = Math.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue);
  const s = Math.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function pixel([lightness, a, b]) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return pack(
    ...linear.map((value) => {
      const c = Math.min(1, Math.max(0, value));
      return Math.round(255 * (c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055));
    }),
  );
}
