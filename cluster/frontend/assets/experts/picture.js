// The picture of the map: cells, labels and balance bars on a canvas, in the colours of the page.

import { colour, isDark } from "../common.js";
import { pixelOf, rampOf } from "./colours.js";
import { STRIPES, labelStep, layoutOf, paintCells } from "./paint.js";

export class Picture {
  constructor(canvas) {
    this.drawn_ms = 0; // what the newest picture took
    this._canvas = canvas;
    this._context = canvas.getContext("2d");
    this._cells = new OffscreenCanvas(1, 1);
    this._layout = null;
    this.readTheme();
  }

  /** Take over the colours of the page. */
  readTheme() {
    this.ramp = rampOf(isDark());
    this._ink = colour("--ink");
    this._muted = colour("--muted");
    this._line = colour("--line");
    this._accent = colour("--accent");
    this._ground = colour("--surface");
    this._alarm = colour("--bad");
  }

  /** rates [cells] instead of those of the load; look: see map.js; pointed: cell to frame or null. */
  draw(load, rates, look, pointed) {
    const started = performance.now();
    this._load = load;
    this._resize();
    this._drawCells(rates, look);
    this._drawGaps();
    this._drawLabels();
    this._drawBalance();
    this._frame(look.changed, this._accent);
    if (pointed !== null) this._frame([pointed], this._ink);
    this.drawn_ms = performance.now() - started;
  }

  /** Box of a cell in CSS pixels of the canvas. */
  boxOf(cell) {
    const { left, top, across, down, ratio } = this._layout;
    return {
      x: (left + (cell % this._load.numExperts) * across) / ratio,
      y: (top + Math.floor(cell / this._load.numExperts) * down) / ratio,
      width: across / ratio,
      height: down / ratio,
    };
  }

  /** The cell at a place in CSS pixels of the canvas, or null. */
  cellAt(x, y) {
    if (!this._layout) return null;
    const { left, top, across, down, ratio } = this._layout;
    const column = Math.floor((x * ratio - left) / across);
    const row = Math.floor((y * ratio - top) / down);
    const { numExperts, layers } = this._load;
    const isInside = column >= 0 && column < numExperts && row >= 0 && row < layers.length;
    return isInside ? row * numExperts + column : null;
  }

  _resize() {
    const { layers, numExperts } = this._load;
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

  _drawCells(rates, look) {
    const { layers, numExperts, workers } = this._load;
    const { left, top, across, down } = this._layout;
    const width = numExperts * STRIPES;
    if (this._cells.width !== width || this._cells.height !== layers.length) {
      this._cells = new OffscreenCanvas(width, layers.length);
    }
    const painted = paintCells(this._load, rates, {
      mode: look.mode,
      ramp: this.ramp,
      top: look.top,
      alarm: pixelOf(this._alarm),
      ground: pixelOf(this._ground),
      only: look.worker === null ? -1 : workers.indexOf(look.worker),
    });
    const image = new ImageData(new Uint8ClampedArray(painted.buffer), width, layers.length);
    this._cells.getContext("2d").putImageData(image, 0, 0);
    this._context.imageSmoothingEnabled = false;
    this._context.drawImage(this._cells, left, top, numExperts * across, layers.length * down);
  }

  _drawGaps() {
    const { layers, numExperts } = this._load;
    const { left, right, top, across, down, gap, width, height } = this._layout;
    this._context.fillStyle = this._ground;
    for (let i = 1; gap.across && i <= numExperts; i += 1) {
      this._context.fillRect(left + i * across - gap.across, top, gap.across, height - top);
    }
    for (let i = 1; i <= layers.length; i += 1) {
      this._context.fillRect(left, top + i * down - gap.down, width - left - right, gap.down);
    }
  }

  _drawLabels() {
    const { layers, numExperts } = this._load;
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

  /** A bar for each layer: how even its workers are. */
  _drawBalance() {
    const { balancedness } = this._load;
    const { right, top, down, gap, width, ratio } = this._layout;
    const [x, longest] = [width - right + 14 * ratio, right - 14 * ratio];
    const height = Math.min(6 * ratio, down - gap.down);
    this._context.fillStyle = this._muted;
    this._context.textAlign = "left";
    this._context.fillText("balance", x, top / 2);
    balancedness.forEach((share, row) => {
      const y = Math.round(top + row * down + (down - gap.down - height) / 2);
      this._context.fillStyle = this._line;
      this._context.fillRect(x, y, longest, height);
      this._context.fillStyle = this._muted;
      this._context.fillRect(x, y, Math.round(longest * share), height);
    });
  }

  _frame(cells, style) {
    const { left, top, across, down, gap, ratio } = this._layout;
    const line = Math.max(1, Math.round(1.5 * ratio));
    const [width, height] = [across - gap.across + line, down - gap.down + line];
    this._context.strokeStyle = style;
    this._context.lineWidth = line;
    this._context.beginPath();
    for (const cell of cells) {
      const x = left + (cell % this._load.numExperts) * across;
      const y = top + Math.floor(cell / this._load.numExperts) * down;
      this._context.rect(x - line / 2, y - line / 2, width, height);
    }
    this._context.stroke();
  }
}
