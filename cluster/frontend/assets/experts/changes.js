// What happened between two frames: who came and went, what moved. Pure.
//
// A change is {at_s, kind, text, worker?, cells?}; kinds: joined, left, drained, epoch, scale,
// ready, alarm; command is what somebody did on this page.

import { count } from "./frames.js";

const MAX_NAMED = 3;
const NAMES = {
  experts: "expert worker",
  attention: "attention worker",
  router: "router",
  ingress: "ingress",
};

/** Changes from one frame to a later one; either may lack load or status. */
export function changesBetween(before, after) {
  const changes = [];
  const [was, is] = [before.status, after.status];
  if (was && is) changes.push(...ofMembers(was, is), ...ofCounters(was, is), ...ofTiers(was, is));
  if (before.load && after.load) changes.push(...ofHolders(before.load, after.load));
  return changes.map((change) => ({ at_s: after.at_s, ...change }));
}

function* ofMembers(before, after) {
  const old = new Map(before.workers.map((worker) => [worker.worker_id, worker]));
  const now = new Map(after.workers.map((worker) => [worker.worker_id, worker]));
  for (const [id, worker] of old) {
    if (!now.has(id)) yield { kind: "left", worker, text: `${NAMES[worker.role]} ${id} left` };
  }
  for (const [id, worker] of now) {
    if (!old.has(id)) {
      yield { kind: "joined", worker, text: `${NAMES[worker.role]} ${id} joined` };
    } else if (worker.drained && !old.get(id).drained) {
      yield { kind: "drained", text: `${id} is drained: others take over its experts` };
    }
  }
  if (before.ready !== after.ready) {
    const text = after.ready ? "requests are served" : `not ready: ${after.stage}`;
    yield { kind: after.ready ? "ready" : "alarm", text };
  }
}

function* ofHolders(before, after) {
  const isComparable = before.holders.length === after.holders.length;
  if (before.holders === after.holders || !isComparable) return;
  const { cells, resized, added, dropped, orphans } = compareHolders(before, after);
  const what = [added && `${added} added`, dropped && `${dropped} dropped`].filter(Boolean);
  const replicas = what.length ? `: replicas ${what.join(", ")}` : "";
  const text = `epoch ${before.epoch} → ${after.epoch}${replicas}`;
  if (before.epoch !== after.epoch || cells.length) yield { kind: "epoch", cells, text };
  if (resized.length <= MAX_NAMED) {
    for (const cell of resized) yield { kind: "epoch", text: resizing(before, after, cell) };
  }
  if (orphans) yield { kind: "alarm", text: `${count(orphans, "expert")} held by nobody` };
}

/** Cells with other holders, those with more or fewer; replicas that came and went; new orphans. */
function compareHolders(before, after) {
  const found = { cells: [], resized: [], added: 0, dropped: 0, orphans: 0 };
  after.holders.forEach((holders, cell) => {
    const old = before.holders[cell].map((worker) => before.workers[worker]);
    const now = holders.map((worker) => after.workers[worker]);
    const added = now.filter((id) => !old.includes(id)).length;
    const dropped = old.filter((id) => !now.includes(id)).length;
    found.added += added;
    found.dropped += dropped;
    if (added || dropped) found.cells.push(cell);
    if (added !== dropped) found.resized.push(cell);
    if (old.length && !now.length) found.orphans += 1;
  });
  return found;
}

function resizing(before, after, cell) {
  const layer = after.layers[Math.floor(cell / after.numExperts)];
  const name = `layer ${layer} expert ${cell % after.numExperts}`;
  return `${name}: ${before.holders[cell].length} → ${count(after.holders[cell].length, "replica")}`;
}

function* ofTiers(before, after) {
  for (const tier of ["experts", "attention"]) {
    const old = before.tiers?.[tier]?.wanted ?? null;
    const now = after.tiers?.[tier]?.wanted ?? null;
    if (old !== null && now !== null && old !== now) {
      yield { kind: "scale", text: `${tier}: ${count(now, "worker")} wanted, ${old} before` };
    }
  }
}

function* ofCounters(before, after) {
  const grown = (name) => (after.counters?.[name] ?? 0) - (before.counters?.[name] ?? 0);
  const [deaths, replays] = [grown("deaths"), grown("replays")];
  if (deaths > 0) yield { kind: "alarm", text: `${count(deaths, "worker")} died` };
  if (replays > 0) yield { kind: "ready", text: `${count(replays, "request")} went on elsewhere` };
}
