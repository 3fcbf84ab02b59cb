// The heat map: a canvas of layers x experts, walked over by pointer or by arrow keys.
//
// To assistive technology it is a grid of which only the cell in focus exists, inside the canvas.

import { colour, isDark } from "../common.js";
import { pixelOf, rampOf } from "./colours.js";
import { cellText } from "./frames.js";
import { STRIPES, labelStep, layoutOf, paintCells } from "./paint.js";

const EASE_MS = 350;
const still = matchMedia("(prefers-reduced-motion: reduce)");

export class HeatMap {
  /** onPoint(cell or null, its box in CSS pixels of the canvas): what the user looks at. */
  constructor(canvas, onPoint) {
    this.drawn_ms = 0; // what the newest picture took
    this.load = null;
    this._canvas = canvas;
    this._context = canvas.getContext("2d");
    this._cells = new OffscreenCanvas(1, 1);
    this._onPoint = onPoint;
    this._look = { mode: "rate", top: 1, worker: null, changed: [], isLive: true };
    this._shown = null; // rates as painted, on their way to those of the load
    this._focus = 0;
    this._hover = null;
    this._request = 0;
    this.readTheme();
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

  /** Box of a cell in CSS pixels of the canvas. */
  boxOf(cell) {
    const { left, top, across, down, ratio } = this._layout;
    return {
      x: (left + (cell % this.load.numExperts) * across) / ratio,
      y: (top + Math.floor(cell / this.load.numExperts) * down) / ratio,
      width: across / ratio,
      height: down / ratio,
    };
  }

  /** Take over the colours of the page. */
  readTheme() {
    this._ink = colour("--ink");
    this._muted = colour("--muted");
    this._accent = colour("--accent");
    this._ground = colour("--surface");
    this._alarm = colour("--bad");
    this.ramp = rampOf(isDark());
    this._draw();
  }

  _listen() {
    const canvas = this._canvas;
    new ResizeObserver(() => this._draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this._hoverOver(this._cellAt(event)));
    canvas.addEventListener("pointerleave", () => this._hoverOver(null));
    canvas.addEventListener("click", (event) => this.moveTo(this._cellAt(event) ?? this._focus));
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

  _cellAt({ offsetX, offsetY }) {
    if (!this._layout) return null;
    const { left, top, across, down, ratio } = this._layout;
    const column = Math.floor((offsetX * ratio - left) / across);
    const row = Math.floor((offsetY * ratio - top) / down);
    const { numExperts, layers } = this.load;
    const isInside = column >= 0 && column < numExperts && row >= 0 && row < layers.length;
    return isInside ? row * numExperts + column : null;
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
    const started = performance.now();
    this._resize();
    this._drawCells();
    this._drawGaps();
    this._drawLabels();
    this._frame(this._look.changed, this._accent);
    const pointed = this.pointed;
    if (pointed !== null) this._frame([pointed], this._ink);
    this.drawn_ms = performance.now() - started;
    this._onPoint(pointed, pointed === null ? null : this.boxOf(pointed));
  }

  _resize() {
    const { layers, numExperts } = this.load;
    const ratio = devicePixelRatio;
    const width = Math.floor(this._canvas.parentElement.clientWidth * ratio);
    const layout = layoutOf(width, layers.length, numExperts, ratio);
    this._layout = layout;
    if (this._canvas.width !== layout.width || this._canvas.height !== layout.height) {
      this._canvas.width = layout.width;
      this._canvas.height = layout.height;
      this._canvas.style.width = `${layout.width / ratio}px`;
      this._canvas.style.height = `${layout.height / ratio}px`;
    } else {
      this._context.clearRect(0, 0, layout.width, layout.height);
    }
  }

  _drawCells() {
    const { layers, numExperts, workers } = this.load;
    const { left, top, across, down } = this._layout;
    const width = numExperts * STRIPES;
    if (this._cells.width !== width || this._cells.height !== layers.length) {
      this._cells = new OffscreenCanvas(width, layers.length);
    }
    const painted = paintCells(this.load, this._shown, {
      mode: this._look.mode,
      ramp: this.ramp,
      top: this._look.top,
      alarm: pixelOf(this._alarm),
      ground: pixelOf(this._ground),
      only: this._look.worker === null ? -1 : workers.indexOf(this._look.worker),
    });
    const image = new ImageData(new Uint8ClampedArray(painted.buffer), width, layers.length);
    this._cells.getContext("2d").putImageData(image, 0, 0);
    this._context.imageSmoothingEnabled = false;
    this._context.drawImage(this._cells, left, top, numExperts * across, layers.length * down);
  }

  _drawGaps() {
    const { layers, numExperts } = this.load;
    const { left, top, across, down, gap, width, height } = this._layout;
    this._context.fillStyle = this._ground;
    for (let i = 1; gap.across && i <= numExperts; i += 1) {
      this._context.fillRect(left + i * across - gap.across, top, gap.across, height - top);
    }
    for (let i = 1; i <= layers.length; i += 1) {
      this._context.fillRect(left, top + i * down - gap.down, width - left, gap.down);
    }
  }

  _drawLabels() {
    const { layers, numExperts } = this.load;
    const { left, top, across, down, gap, ratio } = this._layout;
    const context = this._context;
    context.fillStyle = this._muted;
    context.font = `${11 * ratio}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    context.textAlign = "center";
    for (let expert = 0; expert < numExperts; expert += labelStep(across, 26 * ratio)) {
      context.fillText(expert, left + expert * across + (across - gap.across) / 2, top / 2);
    }
    context.textAlign = "right";
    for (let row = 0; row < layers.length; row += labelStep(down, 13 * ratio)) {
      context.fillText(layers[row], left - 8 * ratio, top + row * down + (down - gap.down) / 2);
    }
  }

  _frame(cells, style) {
    const { left, top, across, down, gap, ratio } = this._layout;
    const line = Math.max(1, Math.round(1.5 * ratio));
    const [width, height] = [across - gap.across + line, down - gap.down + line];
    this._context.strokeStyle = style;
    this._context.lineWidth = line;
    this._context.beginPath();
    for (const cell of cells) {
      const x = left + (cell % this.load.numExperts) * across;
      const y = top + Math.floor(cell / this.load.numExperts) * down;
      this._context.rect(x - line / 2, y - line / 2, width, height);
    }
    this._context.stroke();
  }
}
