// How one turn of the conversation looks.

import { copyText, element } from "../common.js";
import { showText } from "./markdown.js";

const ENDINGS = {
  length: "cut off at the most tokens allowed",
  abort: "ended by the server",
};

/**
 * The element of a turn. `actions`: edit(text) of a question, regenerate() of an answer.
 * `update({live, asMarkdown})` shows what the turn is now; live: more of it is coming in.
 */
export function turnView(turn, actions) {
  const text = element("div", { className: "text" });
  const article = element("article", { className: `turn ${turn.role}` });
  article.ariaLabel = turn.role === "user" ? "You" : "Answer";
  article.append(text);
  if (turn.role === "user") return userView(turn, actions, article, text);
  const note = element("p", { className: "note" });
  const facts = element("div", { className: "facts small muted" });
  const copy = button("Copy", () => copyText(turn.content));
  const again = button("Regenerate", actions.regenerate);
  const tools = element("p", { className: "tools" }, copy, again);
  article.append(note, facts, tools);
  const update = ({ live, asMarkdown }) => {
    showText(text, turn.content, asMarkdown);
    text.hidden = copy.hidden = !turn.content;
    article.ariaBusy = String(live);
    note.textContent = noteOf(turn, live);
    note.hidden = !note.textContent;
    note.classList.toggle("error", Boolean(turn.error));
    facts.replaceChildren(...factLines(turn.facts));
  };
  return { element: article, update };
}

function userView(turn, actions, article, text) {
  const edit = button("Edit", () => article.replaceChildren(editor(turn, actions, restore)));
  const tools = element("p", { className: "tools" }, edit);
  const restore = () => {
    article.replaceChildren(text, tools);
    edit.focus();
  };
  article.append(tools);
  return { element: article, update: () => showText(text, turn.content, false) };
}

function editor(turn, actions, cancel) {
  const field = element("textarea", { value: turn.content, rows: 3, ariaLabel: "Edited message" });
  const form = element(
    "form",
    { className: "editor" },
    field,
    element("button", { className: "primary" }, "Send"),
    button("Cancel", cancel),
  );
  form.onsubmit = (event) => {
    event.preventDefault();
    if (field.value.trim()) actions.edit(field.value);
  };
  form.onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    if (sends(event)) form.requestSubmit();
  };
  requestAnimationFrame(() => field.focus());
  return form;
}

/** Whether a key in a text field means: send it. Not the Enter that ends an input method's word. */
export function sends(event) {
  const send = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (send) event.preventDefault();
  return send;
}

function button(name, action) {
  return element("button", { className: "quiet small", type: "button", onclick: action }, name);
}

function noteOf({ content, error, stopped, ending, renormalised }, live) {
  if (error) return [error.message, error.code && `(${error.code})`].filter(Boolean).join(" ");
  if (stopped) return "Stopped.";
  if (live) return content ? "" : "…";
  if (ENDINGS[ending]) return `The answer was ${ENDINGS[ending]}.`;
  if (renormalised) return "Experts were away for a while: the others answered in their place.";
  return content ? "" : "The answer is empty.";
}

// ---- numbers

function factLines(facts) {
  if (!facts?.firstMs) return [];
  const lines = [line(...speed(facts))];
  if (facts.timing) lines.push(timeBar(facts.timing), line(...whereTimeWent(facts.timing)));
  return lines;
}

const line = (...parts) => element("p", {}, parts.join(" · "));

function speed({ tokens, promptTokens, firstMs, totalMs, perSecond }) {
  return [
    `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
    ...(perSecond === null ? [] : [`${perSecond.toFixed(1)} tok/s`]),
    `first token ${time(firstMs)}`,
    `${time(totalMs)} in all`,
    ...(promptTokens === null ? [] : [`prompt ${promptTokens}`]),
  ];
}

const PARTS = ["queue", "prefill", "decode"];

function timeBar(timing) {
  const parts = PARTS.map((name) => {
    const part = element("span", { className: name, title: name });
    part.style.flexGrow = timing[`${name}_ms`];
    return part;
  });
  return element("div", { className: "time-bar", ariaHidden: "true" }, ...parts);
}

function whereTimeWent(timing) {
  return [
    ...PARTS.map((name) => `${name} ${time(timing[`${name}_ms`])}`),
    `waiting for experts ${Math.round(100 * timing.hop_share)} %`,
    `cost ${timing.expert_ms.toFixed(1)} expert-ms`,
  ];
}

/** Milliseconds with three digits that matter. */
const time = (ms) =>
  ms >= 1000 ? `${(ms / 1000).toPrecision(3)} s` : `${Number(ms.toPrecision(3))} ms`;
