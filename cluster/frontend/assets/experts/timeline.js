// Time lines of the last minutes: workers present, busy, tokens/s, time between tokens (ITL). One
// canvas each under a common cursor; a click goes to that moment.

import { colour, element } from "../common.js";
import uPlot from "../vendor/uPlot.esm.js";
import { clock, number, percent } from "./frames.js";
import { KEPT_S } from "./history.js";

const HEIGHT = 132;
const PANELS = [
  {
    title: "Workers",
    series: [
      { label: "experts", of: ({ tiers }) => tiers.experts.present, steps: true },
      { label: "attention", of: ({ tiers }) => tiers.attention.present, steps: true },
    ],
    text: number,
    least: 2,
    isWhole: true,
  },
  {
    title: "Busy",
    series: [
      { label: "experts", of: ({ tiers }) => tiers.experts.busy },
      { label: "attention", of: ({ tiers }) => tiers.attention.busy },
    ],
    text: percent,
    least: 1,
  },
  {
    title: "Tokens/s",
    series: [
      { label: "generated", of: ({ status }) => status?.rates?.generated_tokens_per_s ?? null },
      { label: "prompt", of: ({ status }) => status?.rates?.prompt_tokens_per_s ?? null },
    ],
    text: number,
    least: 10,
  },
  {
    title: "ITL",
    series: [
      { label: "p50", of: ({ status }) => milliseconds(status?.rates?.itl_s?.p50) },
      { label: "p99", of: ({ status }) => milliseconds(status?.rates?.itl_s?.p99) },
    ],
    text: (value) => `${number(value)} ms`,
    least: 10,
  },
];

export class TimeLines {
  /** onSeek(at_s): the user clicked at that moment. */
  constructor(place, onSeek) {
    this._panels = PANELS.map((panel) => new Panel(panel, onSeek));
    place.append(...this._panels.map(({ figure }) => figure));
  }

  /** All frames of the history; at_s: the moment that the page shows, null if that is now. */
  show(frames, at_s) {
    for (const panel of this._panels) panel.show(frames, at_s);
  }

  /** Take over the colours of the page. */
  readTheme() {
    for (const panel of this._panels) panel.rebuild();
  }
}

class Panel {
  constructor(panel, onSeek) {
    this._panel = panel;
    this._onSeek = onSeek;
    this._at_s = null;
    this._data = [[], ...panel.series.map(() => [])];
    this._values = panel.series.map(() => element("span", { className: "number" }));
    const legend = panel.series.map(({ label }, i) =>
      element("span", { className: `key key-${i}` }, `${label} `, this._values[i]),
    );
    const caption = element("figcaption", {}, element("h3", {}, panel.title), ...legend);
    this._place = element("div", { className: "plot" });
    this.figure = element("figure", { className: "panel" }, caption, this._place);
    new ResizeObserver(() => this._resize()).observe(this._place);
  }

  show(frames, at_s) {
    const { series } = this._panel;
    this._at_s = at_s;
    this._data = [
      frames.map((frame) => frame.at_s),
      ...series.map(({ of }) => frames.map((frame) => of(frame))),
    ];
    const last = at_s === null ? frames.length - 1 : frames.findLastIndex((f) => f.at_s <= at_s);
    this._showValues((this._shown = last));
    if (this._plot) this._plot.setData(this._data);
    else this.rebuild();
  }

  rebuild() {
    this._plot?.destroy();
    if (this._place.clientWidth) this._plot = new uPlot(this._options(), this._data, this._place);
  }

  _showValues(index) {
    this._values.forEach((place, i) => {
      const value = this._data[i + 1][index];
      place.textContent = value == null ? "–" : this._panel.text(value);
    });
  }

  _resize() {
    this._plot?.setSize({ width: this._place.clientWidth, height: HEIGHT });
  }

  _options() {
    const colours = [colour("--accent"), colour("--warn")];
    const axis = { stroke: colour("--muted"), font: "11px system-ui, sans-serif" };
    const line = { stroke: colour("--line"), width: 1 };
    const end = ({ data }) => data[0].at(-1) ?? Date.now() / 1000;
    return {
      width: this._place.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: {
        y: false,
        points: { size: 6 },
        drag: { x: false, y: false },
        sync: { key: "shoal" },
      },
      scales: {
        x: { time: true, range: (plot) => [end(plot) - KEPT_S, end(plot)] },
        y: { range: (_, low, high) => [0, Math.max(this._panel.least, (high ?? 0) * 1.1)] },
      },
      axes: [
        {
          ...axis,
          size: 24,
          grid: { show: false },
          ticks: { show: false },
          values: (_, ticks) => ticks.map((at_s) => clock(at_s).slice(0, 5)),
        },
        {
          ...axis,
          size: 52,
          space: 34,
          grid: line,
          ticks: { show: false },
          values: (_, ticks) => ticks.map(this._panel.text),
          ...(this._panel.isWhole ? { incrs: [1, 2, 5, 10, 20, 50, 100, 500] } : {}),
        },
      ],
      series: [
        {},
        ...this._panel.series.map(({ label, steps }, i) => ({
          label,
          stroke: colours[i],
          width: 1.75,
          points: { show: false },
          ...(steps ? { paths: uPlot.paths.stepped({ align: 1 }) } : {}),
        })),
      ],
      hooks: {
        draw: [(plot) => this._drawMoment(plot)],
        ready: [(plot) => this._seekOnClick(plot)],
        setCursor: [({ cursor }) => this._showValues(cursor.idx ?? this._shown)],
      },
    };
  }

  /** A line where the rest of the page is, while that is not now. */
  _drawMoment(plot) {
    if (this._at_s === null) return;
    const x = Math.round(plot.valToPos(this._at_s, "x", true));
    plot.ctx.fillStyle = colour("--ink");
    plot.ctx.fillRect(x, plot.bbox.top, Math.max(1, devicePixelRatio), plot.bbox.height);
  }

  _seekOnClick(plot) {
    plot.over.addEventListener("click", ({ offsetX }) => this._onSeek(plot.posToVal(offsetX, "x")));
  }
}

const milliseconds = (seconds) => (seconds == null ? null : 1000 * seconds);
