// The numbers, once a second: the stream of the experts' load and the state of the cluster.
// A stream that the server ends is opened again when its next event is due; whatever breaks is tried
// again, less and less often, and said.

import { eventsOf, needsKey, request, requestJson } from "../common.js";
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
    this._nextKey = new Promise((done) => (this._keyIsThere = done));
  }

  start() {
    this._onState({ kind: "connecting", text: "Connecting." });
    this._poll();
    this._follow();
  }

  /** Somebody gave another key. */
  useKey() {
    this._keyIsThere();
    this._nextKey = new Promise((done) => (this._keyIsThere = done));
  }

  async _poll() {
    for (;;) {
      const due_ms = performance.now() + 1000 * INTERVAL_S;
      try {
        this._status = await requestJson("status", {
          signal: AbortSignal.timeout(1000 * STALLED_S),
        });
      } catch (error) {
        this._status = null;
        if (needsKey(error)) await this._nextKey;
      }
      if (this._fault) this._onMoment(null, this._status);
      await sleep(due_ms - performance.now());
    }
  }

  async _follow() {
    let wait_s = FIRST_RETRY_S;
    for (;;) {
      let due_ms = performance.now() + 1000 * INTERVAL_S;
      try {
        for await (const load of this._loads()) {
          due_ms = performance.now() + 1000 * INTERVAL_S;
          wait_s = FIRST_RETRY_S;
          this._fault = null;
          this._onState({ kind: "live", text: "Live." });
          this._onMoment(load, this._status);
        }
        await sleep(due_ms - performance.now());
      } catch (error) {
        this._fault = error;
        await this._wait(wait_s);
        wait_s = Math.min(LAST_RETRY_S, 2 * wait_s);
      }
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

  /** Say what is wrong and wait until it is time to try again. */
  async _wait(wait_s) {
    if (needsKey(this._fault)) {
      this._onState({ kind: "key", text: this._fault.message });
      return this._nextKey;
    }
    const kind = this._fault.status ? "directory" : "server";
    const why =
      this._fault.name === "AbortError" ? "The server says nothing." : this._fault.message;
    this._onState({ kind, text: `${why} Trying again.` });
    return sleep(1000 * wait_s);
  }
}

const sleep = (wait_ms) => new Promise((done) => setTimeout(done, wait_ms));
