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
  const scale = element("span", { className: "scale" });
  const stops = [0, 0.2, 0.4, 0.6, 0.8, 1].map((share) => css(shade(ramp, share)));
  scale.style.background = `linear-gradient(to right in oklab, ${stops.join(", ")})`;
  return ["0", scale, `${number(top)} rows/s`];
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
