// Where cells lie on the canvas and which colour each has. Pure: numbers in, numbers out.

import { blend, shade, workerPixel } from "./colours.js";

/** Columns of pixels a cell is painted with: stripes of 1, 2, 3, 4, 6 or 12 holders come out even. */
export const STRIPES = 12;
const DIMMED = 0.85;
const MAX_REPLICAS_SHOWN = 4; // the scale of replicas goes at least this far

/** Boxes in device pixels; width: of the room there is; ratio: device pixels a CSS pixel.
 *
 * Whole pixels, all cells alike: a map wider than its room (over 1,000 experts) scrolls.
 */
export function layoutOf(width, numLayers, numExperts, ratio) {
  const left = Math.round(36 * ratio);
  const right = Math.round(66 * ratio);
  const top = Math.round(20 * ratio);
  const fitting = Math.floor((width - left - right) / Math.max(numExperts, 1));
  const across = Math.round(Math.min(Math.max(fitting, 1), 64 * ratio));
  const down = Math.round(Math.min(Math.max(across * 1.2, 8 * ratio), 44 * ratio));
  const gapOf = (pitch) =>
    Math.round((pitch >= 20 * ratio ? 2 : pitch >= 7 * ratio ? 1 : 0) * ratio);
  return {
    left,
    right,
    top,
    across,
    down,
    gap: { across: gapOf(across), down: gapOf(down) },
    width: left + across * numExperts + right,
    height: top + down * numLayers,
    ratio,
  };
}

/** Every how many cells an axis has a label, so that labels that need `room` do not touch. */
export function labelStep(pitch, room) {
  let step = 1;
  while (step * pitch < room) step *= 2;
  return step;
}

/** Where the scale of replicas ends. */
export function replicaTop(load) {
  return load.holders.reduce((top, { length }) => Math.max(top, length), MAX_REPLICAS_SHOWN);
}

/** Packed pixels [layers][experts * STRIPES] of rates [cells].
 *
 * Rates are shown by their square root: a tenth of the busiest is well told from nothing.
 *
 * paint: {mode: "rate" | "replicas" | "worker", ramp, top: rows/s at its end, alarm, ground: packed
 * pixels, only: position of the one worker whose cells keep their colour, or -1}.
 */
export function paintCells(load, rates, paint) {
  const painted = new Uint32Array(rates.length * STRIPES);
  const topReplicas = replicaTop(load);
  for (let cell = 0; cell < rates.length; cell += 1) {
    const holders = load.holders[cell];
    const isDim = paint.only >= 0 && !holders.includes(paint.only);
    const seen = (packed) => (isDim ? blend(packed, paint.ground, DIMMED) : packed);
    const start = cell * STRIPES;
    if (!holders.length) {
      painted.fill(seen(paint.alarm), start, start + STRIPES);
    } else if (paint.mode === "worker") {
      holders.forEach((holder, i) => {
        const from = start + Math.floor((i * STRIPES) / holders.length);
        painted.fill(seen(workerPixel(load.seats[holder])), from, start + STRIPES);
      });
    } else {
      const isRate = paint.mode === "rate";
      const share = isRate ? Math.sqrt(rates[cell] / paint.top) : holders.length / topReplicas;
      painted.fill(seen(shade(paint.ramp, share)), start, start + STRIPES);
    }
  }
  return painted;
}
