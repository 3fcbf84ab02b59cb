// Where cells lie on the canvas and which colour each has. Pure: numbers in, numbers out.

import { blend, shade, workerPixel } from "./colours.js";

/** Columns of pixels a cell is painted with: stripes of 1, 2, 3, 4, 6 or 12 holders come out even. */
export const STRIPES = 12;
const DIMMED = 0.82;

/** Boxes in device pixels; ratio: device pixels a CSS pixel.
 *
 * Whole pixels, all cells alike: a map that is wider than `width` (over 1,000 experts) scrolls.
 */
export function layoutOf(width, numLayers, numExperts, ratio) {
  const left = Math.round(40 * ratio);
  const top = Math.round(20 * ratio);
  const fitting = Math.floor((width - left) / Math.max(numExperts, 1));
  const across = Math.round(Math.min(Math.max(fitting, 1), 56 * ratio));
  const down = Math.round(Math.min(Math.max(across * 1.15, 8 * ratio), 40 * ratio));
  return {
    left,
    top,
    across,
    down,
    gapAcross: across >= 22 * ratio ? Math.round(2 * ratio) : across >= 7 * ratio ? Math.round(ratio) : 0,
    gapDown: down >= 22 * ratio ? Math.round(2 * ratio) : Math.round(ratio),
    width: left + across * numExperts,
    height: top + down * numLayers,
  };
}

/** Every how many cells an axis has a label, so that labels of `needed` pixels do not touch. */
export function labelStep(pitch, needed) {
  return [1, 2, 4, 8, 16, 32, 64, 128, 256].find((step) => step * pitch >= needed) ?? 512;
}

/** The largest number of replicas on the scale. */
export function replicaTop(load) {
  return load.holders.reduce((top, holders) => Math.max(top, holders.length), 4);
}

/** Packed pixels [layers][experts * STRIPES].
 *
 * paint: {mode: "rate" | "replicas" | "worker", pixels: a ramp, top, alarm, ground: packed pixels,
 * only: position of the one worker whose cells keep their colour, or -1}; rates [cells].
 */
export function paintCells(load, rates, paint) {
  const painted = new Uint32Array(rates.length * STRIPES);
  const topReplicas = replicaTop(load);
  for (let cell = 0; cell < rates.length; cell += 1) {
    const holders = load.holders[cell];
    const dim = paint.only >= 0 && !holders.includes(paint.only);
    const shown = (packed) => (dim ? blend(packed, paint.ground, DIMMED) : packed);
    const start = cell * STRIPES;
    if (!holders.length) {
      painted.fill(shown(paint.alarm), start, start + STRIPES);
    } else if (paint.mode === "worker") {
      for (let stripe = 0; stripe < STRIPES; stripe += 1) {
        const holder = holders[Math.floor((stripe * holders.length) / STRIPES)];
        painted[start + stripe] = shown(workerPixel(holder));
      }
    } else {
      const share = paint.mode === "rate" ? rates[cell] / paint.top : holders.length / topReplicas;
      painted.fill(shown(shade(paint.pixels, share)), start, start + STRIPES);
    }
  }
  return painted;
}
