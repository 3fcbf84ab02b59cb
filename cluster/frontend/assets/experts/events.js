// What happened, newest first.

import { element } from "../common.js";
import { clock } from "./frames.js";

const MAX_SHOWN = 200;
const MARKS = {
  joined: "+",
  left: "−",
  drained: "↘",
  epoch: "⇄",
  scale: "↕",
  ready: "✓",
  alarm: "!",
  command: "›",
};

export class EventList {
  constructor(list) {
    this._list = list;
    this._newest = null;
  }

  /** changes: oldest first. */
  show(changes) {
    const known = changes.lastIndexOf(this._newest);
    for (const change of changes.slice(known + 1)) this._list.prepend(lineOf(change));
    while (this._list.children.length > MAX_SHOWN) this._list.lastChild.remove();
    this._newest = changes.at(-1) ?? null;
  }
}

function lineOf({ at_s, kind, text }) {
  const mark = element("span", { className: "mark", ariaHidden: "true" }, MARKS[kind]);
  const time = element("time", { className: "number muted" }, clock(at_s));
  return element("li", { className: kind }, time, mark, element("span", {}, text));
}
