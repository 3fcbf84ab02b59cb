// The map as a table: one layer after the other, for those who do not see it.

import { element } from "../common.js";
import { cellOf, number, percent } from "./frames.js";

const COLUMNS = ["Expert", "Rows/s", "Share of the layer", "Replicas", "Held by"];

export class LayerTable {
  /** details: element that holds all of it; nothing is made while it is closed. */
  constructor(details) {
    this._details = details;
    this._choice = element("select", { id: "table-layer" });
    this._caption = element("caption", {});
    this._body = element("tbody");
    const head = COLUMNS.map((name) => element("th", { scope: "col" }, name));
    details.append(
      element("label", { htmlFor: "table-layer" }, "Layer ", this._choice),
      element(
        "table",
        {},
        this._caption,
        element("thead", {}, element("tr", {}, ...head)),
        this._body,
      ),
    );
    this._choice.onchange = () => this._fill();
    details.ontoggle = () => this._fill();
  }

  show(load) {
    this._load = load;
    if (this._choice.options.length !== load.layers.length) {
      this._choice.replaceChildren(...load.layers.map((layer, i) => new Option(layer, i)));
    }
    this._fill();
  }

  _fill() {
    if (!this._details.open || !this._load) return;
    const position = Number(this._choice.value);
    const { numExperts, layers, layerRates, balancedness } = this._load;
    this._caption.textContent =
      `Layer ${layers[position]}: ${number(layerRates[position])} rows/s; ` +
      `workers ${percent(balancedness[position])} balanced (mean of busiest)`;
    const lines = Array.from({ length: numExperts }, (_, expert) => {
      const cell = cellOf(this._load, position * numExperts + expert);
      const texts = [
        number(cell.rate),
        percent(cell.share),
        cell.holders.length,
        cell.holders.join(", "),
      ];
      const name = element("th", { scope: "row" }, String(expert));
      return element("tr", {}, name, ...texts.map((text) => element("td", {}, String(text))));
    });
    this._body.replaceChildren(...lines);
  }
}
