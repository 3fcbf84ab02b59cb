// The heat map: a picture of layers x experts, walked over by pointer or by arrow keys.
//
// To assistive technology it is a grid of which only the cell in focus exists, inside the canvas.

import { cellText } from "./frames.js";
import { Picture } from "./picture.js";

const EASE_MS = 350;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class HeatMap {
  /** onPoint(cell or null, its box in CSS pixels of the canvas): what the user looks at. */
  constructor(canvas, onPoint) {
    this.load = null;
    this.picture = new Picture(canvas);
    this._canvas = canvas;
    this._onPoint = onPoint;
    this._look = null;
    this._shown = null; // rates as painted, on their way to those of the load
    this._focus = 0;
    this._hover = null;
    this._request = 0;
    this._listen();
  }

  /** Show a load. look: {mode: "rate" | "replicas" | "worker", top of the scale in rows/s, worker:
   * id of the only one to see or null, changed: cells to frame, isLive: ease over to it}. */
  show(load, look) {
    const isSameMap = this.load?.rates.length === load.rates.length;
    const eases = look.isLive && isSameMap && !still.matches;
    this._from = eases ? this._shown : load.rates;
    if (!isSameMap) this._shown = load.rates;
    this.load = load;
    this._look = look;
    this._focus = Math.min(this._focus, load.rates.length - 1);
    this._since = performance.now();
    this._describe();
    this._request ||= requestAnimationFrame((now) => this._ease(now));
  }

  /** The cell that the user looks at, or null. */
  get pointed() {
    return this._hover ?? (this._canvas.matches(":focus-visible") ? this._focus : null);
  }

  /** Take over the colours of the page. */
  readTheme() {
    this.picture.readTheme();
    this._draw();
  }

  _listen() {
    const canvas = this._canvas;
    new ResizeObserver(() => this._draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) =>
      this._hoverOver(this.picture.cellAt(event.offsetX, event.offsetY)),
    );
    canvas.addEventListener("pointerleave", () => this._hoverOver(null));
    canvas.addEventListener("click", (event) =>
      this.moveTo(this.picture.cellAt(event.offsetX, event.offsetY) ?? this._focus),
    );
    canvas.addEventListener("keydown", (event) => this._onKey(event));
    canvas.addEventListener("focus", () => this._draw());
    canvas.addEventListener("blur", () => this._draw());
  }

  _onKey(event) {
    if (!this.load) return;
    const { numExperts, layers } = this.load;
    const column = this._focus % numExperts;
    const row = Math.floor(this._focus / numExperts);
    const [lastColumn, lastRow] = [numExperts - 1, layers.length - 1];
    const target = {
      ArrowLeft: [row, Math.max(column - 1, 0)],
      ArrowRight: [row, Math.min(column + 1, lastColumn)],
      ArrowUp: [Math.max(row - 1, 0), column],
      ArrowDown: [Math.min(row + 1, lastRow), column],
      Home: [event.ctrlKey ? 0 : row, 0],
      End: [event.ctrlKey ? lastRow : row, lastColumn],
      PageUp: [0, column],
      PageDown: [lastRow, column],
    }[event.key];
    if (!target) return;
    event.preventDefault();
    this._hover = null;
    this.moveTo(target[0] * numExperts + target[1]);
  }

  /** Put the focus of the keyboard on a cell. */
  moveTo(cell) {
    if (!this.load) return;
    this._focus = cell;
    this._describe();
    this._draw();
  }

  _hoverOver(cell) {
    if (cell === this._hover) return;
    this._hover = cell;
    this._draw();
  }

  /** Tell assistive technology about the cell in focus. */
  _describe() {
    const { numExperts, layers } = this.load;
    const [row] = this._canvas.children;
    const [cell] = row.children;
    this._canvas.ariaRowCount = layers.length;
    this._canvas.ariaColCount = numExperts;
    row.ariaRowIndex = Math.floor(this._focus / numExperts) + 1;
    cell.ariaColIndex = (this._focus % numExperts) + 1;
    cell.textContent = cellText(this.load, this._focus);
  }

  _ease(now) {
    const passed = Math.min(1, Math.max(0, (now - this._since) / EASE_MS));
    const { rates } = this.load;
    const [from, share] = [this._from, passed * (2 - passed)];
    const isThere = passed === 1 || from === rates;
    this._shown = isThere ? rates : rates.map((rate, i) => from[i] + (rate - from[i]) * share);
    this._request = isThere ? 0 : requestAnimationFrame((later) => this._ease(later));
    this._draw();
  }

  _draw() {
    if (!this._shown) return;
    const pointed = this.pointed;
    this.picture.draw(this.load, this._shown, this._look, pointed);
    this._onPoint(pointed, pointed === null ? null : this.picture.boxOf(pointed));
  }
}
