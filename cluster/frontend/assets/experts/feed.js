// The numbers, once a second: the stream of the experts' load and the state of the cluster.
// Whatever breaks is tried again, less and less often, and said.

import { ApiError, eventsOf, request, requestJson } from "../common.js";
import { readLoad } from "./frames.js";

const INTERVAL_S = 1;
const STALLED_S = 10; // a stream that says nothing for so long is dead
const FIRST_RETRY_S = 1;
const LAST_RETRY_S = 8;

export class Feed {
  /** onMoment(load or null, status or null) about once a second; onState({kind, text}) with kind
   * "connecting", "live", "directory" (away), "server" (away) or "key" (needed). */
  constructor(onMoment, onState) {
    this._onMoment = onMoment;
    this._onState = onState;
    this._status = null;
    this._fault = null; // of the stream, while it is broken
    this._wake = () => {};
  }

  start() {
    this._onState({ kind: "connecting", text: "connecting" });
    this._poll();
    this._follow();
  }

  /** Try again now: there is another key. */
  retry() {
    this._wake();
  }

  async _poll() {
    const due_ms = performance.now() + 1000 * INTERVAL_S;
    try {
      this._status = await requestJson("status", { signal: AbortSignal.timeout(1000 * STALLED_S) });
    } catch {
      this._status = null;
    }
    if (this._fault) this._onMoment(null, this._status);
    setTimeout(() => this._poll(), Math.max(0, due_ms - performance.now()));
  }

  async _follow() {
    let wait_s = FIRST_RETRY_S;
    for (;;) {
      try {
        for await (const load of this._loads()) {
          wait_s = FIRST_RETRY_S;
          this._fault = null;
          this._onState({ kind: "live", text: "live" });
          this._onMoment(load, this._status);
        }
        this._fault = new ApiError("The server ended the stream.");
      } catch (error) {
        this._fault = error;
      }
      await this._pause(wait_s);
      wait_s = Math.min(LAST_RETRY_S, 2 * wait_s);
    }
  }

  async *_loads() {
    const stall = new AbortController();
    let timer;
    const restart = () => {
      clearTimeout(timer);
      timer = setTimeout(() => stall.abort(), 1000 * STALLED_S);
    };
    try {
      restart();
      const path = `v1/experts/load/stream?compact=true&interval_s=${INTERVAL_S}`;
      const response = await request(path, { signal: stall.signal });
      for await (const body of eventsOf(response)) {
        restart();
        yield readLoad(body);
      }
    } finally {
      clearTimeout(timer);
    }
  }

  /** Wait, counting down, until it is time or somebody says so. */
  async _pause(wait_s) {
    for (let left_s = wait_s; left_s > 0; left_s -= 1) {
      this._onState(stateOf(this._fault, left_s));
      const isWoken = await new Promise((done) => {
        this._wake = () => done(true);
        setTimeout(() => done(false), 1000);
      });
      if (isWoken) return;
    }
    this._onState(stateOf(this._fault, 0));
  }
}

function stateOf(fault, left_s) {
  const again = left_s > 0 ? `trying again in ${left_s} s` : "trying again";
  if (fault.name === "AbortError") return { kind: "server", text: `Nothing came for ${STALLED_S} s; ${again}.` };
  const kind = { 0: "server", 401: "key", 403: "key" }[fault.status] ?? "directory";
  return { kind, text: `${fault.message} ${again[0].toUpperCase()}${again.slice(1)}.` };
}
