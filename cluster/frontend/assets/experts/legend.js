// What the colours of the map mean.

import { element } from "../common.js";
import { css, shade } from "./colours.js";
import { number } from "./frames.js";
import { replicaTop } from "./paint.js";

const MAX_SWATCHES = 8;

/** Fill the legend for a load shown as `look` says (see map.js); ramp: packed pixels. */
export function showLegend(place, load, look, ramp) {
  const parts = { rate: ofRates, replicas: ofReplicas, worker: ofWorkers }[look.mode](
    load,
    look,
    ramp,
  );
  if (load.holders.some((holders) => !holders.length)) parts.push(swatch("var(--bad)"), "nobody");
  place.replaceChildren(...parts);
}

function ofRates(load, { top }, ramp) {
  const isClipped = load.rates.some((rate) => rate > top);
  const end = `${isClipped ? "≥ " : ""}${number(top)} rows/s`;
  const middle = top < 100 ? String(top / 4) : number(top / 4); // the scale is a square root's
  return ["0", scale(ramp, 0, 0.5), middle, scale(ramp, 0.5, 1), end];
}

function scale(ramp, from, to) {
  const made = element("span", { className: "scale" });
  const stops = [0, 0.25, 0.5, 0.75, 1].map((part) => css(shade(ramp, from + (to - from) * part)));
  made.style.background = `linear-gradient(to right in oklab, ${stops.join(", ")})`;
  return made;
}

function ofReplicas(load, _, ramp) {
  const top = replicaTop(load);
  const step = Math.ceil(top / MAX_SWATCHES);
  const numbers = Array.from({ length: Math.ceil(top / step) }, (_, i) => 1 + i * step);
  return numbers.flatMap((replicas) => [
    swatch(css(shade(ramp, replicas / top))),
    String(replicas),
  ]);
}

function ofWorkers() {
  return ["Colours as in the list of workers; stripes are replicas"];
}

function swatch(colour) {
  const made = element("span", { className: "swatch" });
  made.style.background = colour;
  return made;
}
