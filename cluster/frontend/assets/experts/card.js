// What is known of the cell that pointer or focus is on: a card beside it, on top of the map.

import { element } from "../common.js";
import { cellOf, number, percent } from "./frames.js";

const AWAY = 12; // CSS pixels from the cell

/** Fill and place the card; cell null: hide it. box: of the cell within the map. */
export function showCard(card, load, cell, box) {
  card.hidden = cell === null;
  if (cell === null) return;
  const { layer, expert, rate, share, timesEven, holders, balance } = cellOf(load, cell);
  const lines = [
    ["rows/s", number(rate)],
    ["of the layer", `${percent(share)}, ${timesEven.toFixed(1)} × even`],
    ["replicas", String(holders.length)],
    ["held by", holders.join(", ") || "nobody"],
    ["balance", `${percent(balance)}, workers of this layer`],
  ];
  card.replaceChildren(
    element("h3", {}, `Layer ${layer} · expert ${expert}`),
    element(
      "dl",
      {},
      ...lines.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]),
    ),
  );
  place(card, box);
}

/** Right of the cell, or left of it where there is no room; above it where it would be cut off. */
function place(card, box) {
  const room = card.parentElement.getBoundingClientRect();
  const right = box.x + box.width + AWAY;
  const fits = right + card.offsetWidth <= room.width;
  card.style.left = `${fits ? right : Math.max(0, box.x - AWAY - card.offsetWidth)}px`;
  card.style.top = `${box.y}px`;
}
