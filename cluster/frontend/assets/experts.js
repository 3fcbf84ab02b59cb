// The page /experts: puts the feed, its history and the views together.

import { byId, mountTop } from "./common.js";
import { act } from "./experts/actions.js";
import { showCard } from "./experts/card.js";
import { EventList } from "./experts/events.js";
import { Feed } from "./experts/feed.js";
import { clock, count, number } from "./experts/frames.js";
import { History } from "./experts/history.js";
import { showLegend } from "./experts/legend.js";
import { HeatMap } from "./experts/map.js";
import { LayerTable } from "./experts/table.js";
import { TimeLines } from "./experts/timeline.js";
import { WorkerTable } from "./experts/workers.js";

const WORKERS_MARKED_S = 8; // how long who came or went stands out
const CELLS_MARKED_S = 4;
const DOTS = { live: "good", connecting: "warn", key: "warn", directory: "bad", server: "bad" };

class Page {
  constructor() {
    this.history = new History();
    this.map = new HeatMap(byId("map"), (cell, box) => this._point(cell, box));
    this._lines = new TimeLines(byId("lines"), (at_s) => this._seek(at_s));
    this._workers = new WorkerTable(
      byId("workers"),
      (...what) => this._act(...what),
      (id) => this._pick(id),
    );
    this._events = new EventList(byId("events"));
    this._table = new LayerTable(byId("table"));
    this._mode = "rate";
    this._picked = null; // worker whose experts are seen alone
    this.at_s = null; // the moment that is shown; null: now
    this._listen();
    const take = (load, status) => this._take(load, status);
    this._feed = new Feed(take, (state) => this._tell(state));
    this._feed.start();
  }

  /** The load on the map: of the moment shown, or the last one before it. */
  get load() {
    return this.history.lastWith("load", this.at_s ?? Infinity)?.load ?? null;
  }

  _listen() {
    byId("mode").addEventListener("change", ({ target }) => {
      this._mode = target.value;
      this._show();
    });
    byId("moment").addEventListener("input", ({ target }) => {
      this._seek(this.history.newest.at_s + Number(target.value));
    });
    byId("pause").addEventListener("click", () => {
      this.at_s = this.at_s === null ? (this.history.newest?.at_s ?? null) : null;
      this._show();
    });
    document.addEventListener("shoal:theme", () => {
      this.map.readTheme();
      this._lines.readTheme();
      this._show();
    });
    document.addEventListener("shoal:key", () => this._feed.useKey());
  }

  _take(load, status) {
    this.history.add(Date.now() / 1000, load, status);
    this._events.show(this.history.changes);
    this._show();
  }

  _tell({ kind, text }) {
    const [dot, words] = byId("feed").children;
    dot.className = `dot ${DOTS[kind]}`;
    if (words.textContent !== text) words.textContent = text;
    byId("feed").dataset.kind = kind;
  }

  _seek(at_s) {
    this.at_s = at_s < this.history.newest?.at_s ? at_s : null;
    this._show();
  }

  async _act(action, worker, kind) {
    const done = await act(action, worker, kind);
    if (!done) return;
    this.history.note(Date.now() / 1000, done);
    this._events.show(this.history.changes);
  }

  _pick(worker) {
    this._picked = worker;
    this._show();
  }

  _show() {
    const frame = this.at_s === null ? this.history.newest : this.history.at(this.at_s);
    if (!frame) return;
    this._showMap(frame);
    this._showMoment(frame);
    this._showWorkers(frame);
    this._lines.show(this.history.frames, this.at_s);
  }

  _showWorkers(frame) {
    const known = this.history.lastWith("status", frame.at_s) ?? frame;
    const changes = this.history.changesAt(frame.at_s, WORKERS_MARKED_S);
    this._workers.show(known, changes, this._picked);
    byId("workers").classList.toggle("stale", frame.status === null);
  }

  _showMap(frame) {
    const { load, top } = this.history.lastWith("load", frame.at_s) ?? frame;
    const changes = this.history.changesAt(frame.at_s, CELLS_MARKED_S);
    byId("empty").hidden = load !== null;
    if (!load) return;
    const look = {
      mode: this._mode,
      top,
      worker: this._picked,
      changed: changes.flatMap(({ cells }) => cells ?? []),
      isLive: this.at_s === null,
    };
    this.map.show(load, look);
    this._table.show(load);
    showLegend(byId("legend"), load, look, this.map.picture.ramp);
    byId("map-place").classList.toggle("stale", frame.load === null);
    byId("summary").textContent = summaryOf(load);
  }

  _showMoment(frame) {
    const newest = this.history.newest.at_s;
    const slider = byId("moment");
    slider.min = Math.round(this.history.frames[0].at_s - newest);
    slider.value = Math.round(frame.at_s - newest);
    const text = this.at_s === null ? "now" : clock(frame.at_s);
    slider.ariaValueText = text;
    byId("moment-text").textContent = text;
    byId("pause").textContent = this.at_s === null ? "Pause" : "Back to now";
  }

  _point(cell, box) {
    showCard(byId("card"), this.map.load, cell, box);
  }
}

function summaryOf({ model, layers, numExperts, epoch, layerRates }) {
  const total = layerRates.reduce((sum, rate) => sum + rate, 0);
  const size = `${count(layers.length, "layer")} × ${numExperts} experts`;
  return `${model} · ${size} · epoch ${epoch} · ${number(total)} rows/s`;
}

mountTop("experts");
window.shoalExperts = new Page(); // for scripts and the console
