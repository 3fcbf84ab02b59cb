// The last minutes, in memory: frames and changes, both bounded.

import { changesBetween } from "./changes.js";
import { roundUp } from "./colours.js";
import { shareTables, tiersOf } from "./frames.js";

export const KEPT_S = 300;
const MAX_CHANGES = 500;
const HALF_LIFE_S = 6; // of the scale's top once the load falls; it rises at once
const CLIPPED_SHARE = 0.002; // of all cells: a few that stand out shall not darken all others

export class History {
  constructor() {
    this.frames = [];
    this.changes = []; // newest last
    this._peak = 0;
    this._known = { load: null, status: null }; // the newest of each, however old
    this._seats = new Map(); // worker id -> position among all there were: keeps its colour
  }

  get newest() {
    return this.frames.at(-1) ?? null;
  }

  /** Keep a moment; returns its frame. load, status: null while they are not to be had. */
  add(at_s, load, status) {
    const shared = load && this._seated(shareTables(load, this._known.load));
    const top = this._topOf(at_s, shared);
    const frame = { at_s, load: shared, status, tiers: tiersOf(status), top };
    this.changes.push(...changesBetween(this._known, frame));
    this.changes.splice(0, this.changes.length - MAX_CHANGES);
    this._known = { load: shared ?? this._known.load, status: status ?? this._known.status };
    this.frames.push(frame);
    while (this.frames[0].at_s < at_s - KEPT_S) this.frames.shift();
    return frame;
  }

  /** Note what somebody did. */
  note(at_s, text) {
    this.changes.push({ at_s, kind: "command", text });
  }

  /** The frame at a moment: the newest that is not later, else the oldest. */
  at(at_s) {
    return this.frames.findLast((frame) => frame.at_s <= at_s) ?? this.frames[0] ?? null;
  }

  /** The newest frame up to a moment that has a "load" or a "status", or null. */
  lastWith(what, at_s) {
    return this.frames.findLast((frame) => frame[what] && frame.at_s <= at_s) ?? null;
  }

  /** Changes of the `span_s` seconds before a moment. */
  changesAt(at_s, span_s) {
    return this.changes.filter((change) => change.at_s > at_s - span_s && change.at_s <= at_s);
  }

  _seated(load) {
    for (const id of load.workers) if (!this._seats.has(id)) this._seats.set(id, this._seats.size);
    return { ...load, seats: load.workers.map((id) => this._seats.get(id)) };
  }

  _topOf(at_s, load) {
    if (load) {
      const passed_s = at_s - (this.newest?.at_s ?? at_s);
      const place = Math.floor((1 - CLIPPED_SHARE) * load.rates.length);
      const high = load.rates.toSorted()[place] ?? 0;
      this._peak = Math.max(high, this._peak * 0.5 ** (passed_s / HALF_LIFE_S));
    }
    return roundUp(this._peak);
  }
}
