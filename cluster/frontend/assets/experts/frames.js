// One moment of the cluster, from what the server answers. Pure.
//
// A frame is {at_s, load, status, tiers, top}: `load` is null while the directory is away, `status`
// while the server is; `top` is where the scale of rows/s ends. A cell is an expert of a layer: position of the layer x experts + expert.

export const ROLES = ["experts", "attention", "router", "ingress"];

/** Load of all experts from GET /v1/experts/load?compact=true.
 *
 * rates [cells] rows/s of the last seconds; holders [cells] lists of positions in `workers`.
 */
export function readLoad(body) {
  const numExperts = body.rows.length ? body.rows[0].length : 0;
  const rates = new Float32Array(body.layers.length * numExperts);
  const layerRates = body.recent_rows.map((rows, position) => {
    let total = 0;
    rows.forEach((count, expert) => {
      rates[position * numExperts + expert] = count / body.recent_s;
      total += count / body.recent_s;
    });
    return total;
  });
  return {
    model: body.model,
    epoch: body.epoch,
    layers: body.layers,
    numExperts,
    workers: body.workers,
    rates,
    layerRates,
    holders: body.holders.flat(),
    balancedness: body.balancedness,
    expertBalancedness: body.expert_balancedness,
  };
}

/** `load` with what `before` says in the same words, so that history keeps it once. */
export function shareTables(load, before) {
  if (before?.workers.join() !== load.workers.join()) return load;
  const isSame = before.epoch === load.epoch;
  const holders = isSame ? before.holders : load.holders.map(sharedWith(before.holders));
  return { ...load, workers: before.workers, holders };
}

const sharedWith = (old) => (holders, cell) =>
  old[cell]?.join() === holders.join() ? old[cell] : holders;

/** All that is known of one cell. */
export function cellOf(load, cell) {
  const position = Math.floor(cell / load.numExperts);
  const rate = load.rates[cell];
  const total = load.layerRates[position];
  return {
    layer: load.layers[position],
    expert: cell % load.numExperts,
    rate,
    share: total > 0 ? rate / total : 0,
    balance: load.balancedness[position],
    timesEven: total > 0 ? (rate * load.numExperts) / total : 0,
    holders: load.holders[cell].map((worker) => load.workers[worker]),
  };
}

/** A cell in one sentence, for those who hear the page. */
export function cellText(load, cell) {
  const { layer, expert, rate, share, timesEven, holders } = cellOf(load, cell);
  return (
    `Layer ${layer}, expert ${expert}: ${number(rate)} rows/s, ${percent(share)} of the layer, ` +
    `${timesEven.toFixed(1)} times even; ${count(holders.length, "replica")}` +
    (holders.length ? ` on ${holders.join(", ")}` : ", held by nobody")
  );
}

/** Role -> {wanted, present, busy: mean of its workers}; null for what is not known. */
export function tiersOf(status) {
  const tiers = {};
  for (const role of ROLES) {
    const workers = (status?.workers ?? []).filter((worker) => worker.role === role);
    const busy = workers.map((worker) => worker.busy).filter((share) => share != null);
    tiers[role] = {
      wanted: status?.tiers?.[role]?.wanted ?? null,
      present: status ? workers.length : null,
      busy: busy.length ? busy.reduce((sum, share) => sum + share) / busy.length : null,
    };
  }
  return tiers;
}

/** A number for people: 0.4, 12, 1,230, 45.6k. */
export function number(value) {
  if (value == null) return "–";
  if (value >= 10_000) {
    const [short, unit] = value >= 1e6 ? [value / 1e6, "M"] : [value / 1e3, "k"];
    return `${short.toFixed(short < 100 ? 1 : 0)}${unit}`;
  }
  if (value >= 10 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(1);
}

export function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)} %`;
}

export function count(amount, thing) {
  return `${amount} ${thing}${amount === 1 ? "" : "s"}`;
}

export function clock(at_s) {
  return new Date(at_s * 1000).toLocaleTimeString("en-GB");
}
