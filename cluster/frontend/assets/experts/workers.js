// Who works, by tier: busy bars, what each holds, what can be done to it. Rows are kept and
// updated, so that focus and pointer stay where they are.

import { element } from "../common.js";
import { css, workerPixel } from "./colours.js";
import { number, percent } from "./frames.js";

const TIERS = [
  { role: "experts", title: "Experts", kind: "expert" },
  { role: "attention", title: "Attention", kind: "attention" },
  { role: "router", title: "Routers", kind: "router" },
  { role: "ingress", title: "Ingress", kind: null },
];
const COLUMNS = ["Worker", "Busy", "Rows/s", "Experts", "Queue", ""];

export class WorkerTable {
  /** onAct(action, worker, kind): "kill" or "drain" was pressed; onPick(worker id or null): the one
   * whose experts shall be seen alone. */
  constructor(table, onAct, onPick) {
    this._tiers = TIERS.map((tier) => new Tier(tier, { onAct, onPick }));
    const head = COLUMNS.map((name) => element("th", { scope: "col" }, name));
    table.append(
      element("thead", {}, element("tr", {}, ...head)),
      ...this._tiers.map((tier) => tier.body),
    );
  }

  /** changes: of the last seconds, so that who came or went stands out; picked: worker id. */
  show(frame, changes, picked) {
    for (const tier of this._tiers) tier.show(frame, changes, picked);
  }
}

class Tier {
  constructor(tier, actions) {
    this._tier = tier;
    this._actions = actions;
    this._rows = new Map(); // worker id -> Row
    this._count = element("span", { className: "muted" });
    const heading = element("th", { colSpan: COLUMNS.length, scope: "rowgroup" });
    heading.append(tier.title, " ", this._count);
    this.body = element("tbody", {}, element("tr", { className: "tier" }, heading));
  }

  show(frame, changes, picked) {
    const shown = workersShown(frame, changes, this._tier.role);
    for (const [id, row] of this._rows) {
      if (!shown.has(id)) {
        row.line.remove();
        this._rows.delete(id);
      }
    }
    [...shown.keys()].sort().forEach((id, i) => {
      if (!this._rows.has(id)) this._rows.set(id, new Row(this._tier, this._actions));
      const row = this._rows.get(id);
      const there = this.body.children[i + 1]; // below the heading
      if (there !== row.line) this.body.insertBefore(row.line, there ?? null);
      row.show(...shown.get(id), frame, picked);
    });
    this._count.textContent = countOf(frame.tiers[this._tier.role]);
    this.body.hidden = !shown.size;
  }
}

/** id -> [worker, "joined" | "left" | ""]: those who are there and those who just left. */
function workersShown(frame, changes, role) {
  const shown = new Map();
  const ofRole = changes.filter(({ worker }) => worker?.role === role);
  for (const { kind, worker } of ofRole) {
    if (kind === "left") shown.set(worker.worker_id, [worker, "left"]);
  }
  const joined = new Set(
    ofRole.filter(({ kind }) => kind === "joined").map(({ worker }) => worker.worker_id),
  );
  for (const worker of frame.status?.workers ?? []) {
    const id = worker.worker_id;
    if (worker.role === role) shown.set(id, [worker, joined.has(id) ? "joined" : ""]);
  }
  return shown;
}

function countOf({ wanted, present }) {
  if (present === null) return "unknown";
  return wanted === null ? `${present} present` : `${present} of ${wanted} present`;
}

class Row {
  constructor({ role, kind }, { onAct, onPick }) {
    this._role = role;
    this._swatch = element("span", { className: "swatch" });
    this._name =
      role === "experts" ? element("button", { className: "quiet name" }) : element("span");
    this._badge = element("span", { className: "badge" });
    this._bar = element("span", { className: "bar" }, element("span"));
    this._busy = element("span", { className: "number" });
    this._cells = ["rows", "held", "queue"].map(() => element("td", { className: "number" }));
    this._buttons = kind
      ? [this._button("drain", kind, onAct), this._button("kill", kind, onAct)]
      : [];
    this._name.onclick = () => onPick(this._isPicked ? null : this._worker.worker_id);
    this.line = element(
      "tr",
      {},
      element("th", { scope: "row" }, this._swatch, this._name, this._badge),
      element("td", { className: "busy" }, this._bar, this._busy),
      ...this._cells,
      element("td", { className: "actions" }, ...this._buttons),
    );
  }

  show(worker, change, frame, picked) {
    this._worker = worker;
    this._isPicked = picked === worker.worker_id;
    this.line.className = change;
    this.line.title = `pid ${worker.pid}${worker.node ? ` on ${worker.node}` : ""}`;
    this._name.textContent = worker.worker_id;
    if (this._role === "experts") this._name.ariaPressed = this._isPicked;
    this._badge.textContent = change || (worker.drained ? "drained" : "");
    this._showColour(frame.load);
    this._showNumbers(change === "left" ? {} : worker);
    const [drain, kill] = this._buttons;
    if (kill) kill.hidden = !frame.status?.chaos || change === "left";
    if (drain) drain.hidden = !this._canDrain(frame, change);
  }

  _canDrain(frame, change) {
    const isExperts = this._role === "experts" && change !== "left";
    return isExperts && Boolean(frame.status?.operations) && !this._worker.drained;
  }

  _showColour(load) {
    const position = load ? load.workers.indexOf(this._worker.worker_id) : -1;
    this._swatch.hidden = position < 0;
    if (position >= 0) this._swatch.style.background = css(workerPixel(load.seats[position]));
  }

  _showNumbers({ busy, rows_per_s: rows, num_experts: held, num_slots: slots, queue }) {
    this._bar.hidden = busy == null;
    this._bar.firstChild.style.width = `${100 * Math.min(1, busy ?? 0)}%`;
    this._busy.textContent = busy == null ? "" : percent(busy);
    const texts = [
      rows == null ? "" : number(rows),
      slots ? `${held} / ${slots}` : "",
      queue ?? "",
    ];
    this._cells.forEach((cell, i) => (cell.textContent = texts[i]));
  }

  _button(action, kind, onAct) {
    const title = action === "kill" ? "Kill" : "Drain";
    const button = element("button", { className: action === "kill" ? "danger" : "" }, title);
    button.onclick = () => onAct(action, this._worker, kind);
    return button;
  }
}
