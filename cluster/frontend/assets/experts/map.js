// The heat map: a canvas of layers x experts, walked over by pointer or by arrow keys.
//
// To assistive technology it is a grid of which only the cell in focus exists, inside the canvas.

import { css, hexPixel, ramp } from "./colours.js";
import { cellText } from "./frames.js";
import { STRIPES, labelStep, layoutOf, paintCells } from "./paint.js";

const EASE_MS = 350;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class HeatMap {
  /** onPoint(cell or null, box in CSS pixels of the canvas): what the user looks at. */
  constructor(canvas, onPoint) {
    this._canvas = canvas;
    this._context = canvas.getContext("2d");
    this._cells = new OffscreenCanvas(1, 1);
    this._onPoint = onPoint;
    this._load = null;
    this._shown = new Float32Array(0); // rates as painted, on their way to the newest
    this._focus = 0;
    this._hover = null;
    this._look = { mode: "rate", theme: "light", top: 1, worker: null, changed: new Set(), isLive: true };
    this.draw_ms = 0; // what the newest picture took
    this._listen();
  }

  /** Show the load of a frame; look: see the constructor. */
  show(load, look) {
    const isOther = this._load?.rates.length !== load.rates.length;
    this._look = { ...this._look, ...look };
    this._load = load;
    this._focus = Math.min(this._focus, load.rates.length - 1);
    this._from = isOther || !this._look.isLive || still.matches ? load.rates : this._shown;
    this._since = performance.now();
    this._describe();
    if (!this._pending) this._pending = requestAnimationFrame((now) => this._step(now));
  }

  /** The cell that the user looks at, or null. */
  get pointed() {
    return this._hover ?? (this._canvas.matches(":focus-visible") ? this._focus : null);
  }

  /** Box of a cell in CSS pixels of the canvas. */
  boxOf(cell) {
    const { left, top, across, down } = this._layout;
    const ratio = devicePixelRatio;
    return {
      x: (left + (cell % this._load.numExperts) * across) / ratio,
      y: (top + Math.floor(cell / this._load.numExperts) * down) / ratio,
      width: across / ratio,
      height: down / ratio,
    };
  }

  _listen() {
    new ResizeObserver(() => this._load && this.show(this._load, {})).observe(this._canvas.parentElement);
    this._canvas.addEventListener("pointermove", (event) => this._point(this._cellAt(event)));
    this._canvas.addEventListener("pointerleave", () => this._point(null));
    this._canvas.addEventListener("click", (event) => this._moveTo(this._cellAt(event) ?? this._focus));
    this._canvas.addEventListener("keydown", (event) => this._onKey(event));
    this._canvas.addEventListener("focus", () => this._point(null));
    this._canvas.addEventListener("blur", () => this._point(null));
  }

  _onKey(event) {
    if (!this._load) return;
    const { numExperts, layers } = this._load;
    const column = this._focus % numExperts;
    const bottom = (layers.length - 1) * numExperts;
    const target = {
      ArrowLeft: column > 0 ? this._focus - 1 : this._focus,
      ArrowRight: column < numExperts - 1 ? this._focus + 1 : this._focus,
      ArrowUp: this._focus >= numExperts ? this._focus - numExperts : this._focus,
      ArrowDown: this._focus < bottom ? this._focus + numExperts : this._focus,
      Home: event.ctrlKey ? 0 : this._focus - column,
      End: event.ctrlKey ? bottom + numExperts - 1 : this._focus - column + numExperts - 1,
      PageUp: column,
      PageDown: bottom + column,
    }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this._hover = null;
    this._moveTo(target);
  }

  _moveTo(cell) {
    this._focus = cell;
    this._describe();
    this._draw();
  }

  _point(cell) {
    this._hover = cell;
    if (this._load) this._moveTo(this._focus);
  }

  _cellAt({ offsetX, offsetY }) {
    if (!this._layout) return null;
    const { left, top, across, down } = this._layout;
    const column = Math.floor((offsetX * devicePixelRatio - left) / across);
    const row = Math.floor((offsetY * devicePixelRatio - top) / down);
    const { numExperts, layers } = this._load;
    const isInside = column >= 0 && column < numExperts && row >= 0 && row < layers.length;
    return isInside ? row * numExperts + column : null;
  }

  /** Tell assistive technology of the cell in focus, and the page of the one looked at. */
  _describe() {
    const { numExperts, layers } = this._load;
    const [row] = this._canvas.children;
    const [cell] = row.children;
    this._canvas.setAttribute("aria-rowcount", layers.length);
    this._canvas.setAttribute("aria-colcount", numExperts);
    row.setAttribute("aria-rowindex", Math.floor(this._focus / numExperts) + 1);
    cell.setAttribute("aria-colindex", (this._focus % numExperts) + 1);
    cell.textContent = cellText(this._load, this._focus);
  }

  _step(now) {
    const share = Math.min(1, (now - this._since) / EASE_MS);
    const { rates } = this._load;
    this._shown =
      share === 1 || this._from === rates
        ? rates
        : rates.map((rate, cell) => this._from[cell] + (rate - this._from[cell]) * share * (2 - share));
    this._draw();
    const isThere = this._shown === rates;
    this._pending = isThere ? 0 : requestAnimationFrame((later) => this._step(later));
  }

  _draw() {
    if (!this._load) return;
    const started = performance.now();
    this._resize();
    this._drawCells();
    this._drawLabels();
    for (const cell of this._look.changed) this._outline(cell, this._style("--accent"), 2);
    if (this.pointed !== null) this._outline(this.pointed, this._style("--ink"), 2);
    this.draw_ms = performance.now() - started;
    this._onPoint(this.pointed, this.pointed === null ? null : this.boxOf(this.pointed));
  }
}
