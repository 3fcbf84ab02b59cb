// The chat page: a conversation with the model, as any client of the API would have it.

import {
  apiKey,
  byId,
  copyText,
  element,
  mountTop,
  needsKey,
  recall,
  remember,
  requestJson,
  root,
  toast,
} from "./common.js";
import { streamAnswer } from "./chat/answer.js";
import { curlSample, pythonSample } from "./chat/samples.js";
import { requestBody, restoreSettings, suggestMemory } from "./chat/settings.js";
import { sends, turnView } from "./chat/turn.js";

const STORE = "shoal.chat";
/** The model that ships knows these, and was trained on single questions. */
const SHIPPED_MODEL = "shoal-tiny";
const SUGGESTIONS = [
  "Tell me a story about a brave fox named Pip.",
  "What is 37 + 45?",
  "Write a Python function that adds 7 to a number.",
  'How do you say "the red house" in French?',
];

/** {role, content}; an answer has facts, ending, stopped, error too: see chat/answer.js. */
let turns = recall(STORE, []);
let views = [];
/** AbortController of the answer that is coming in. */
let running = null;

let ready = false;
/** Whether somebody has to give a key, or a better one, before it makes sense to ask again. */
let locked = false;

// ---- the conversation

function send(text) {
  turns.push({ role: "user", content: text });
  answer();
}

/** Ask for the next turn, with what has been said. */
async function answer() {
  const body = requestBody(turns);
  const turn = { role: "assistant", content: "" };
  const mine = new AbortController();
  running = mine;
  turns.push(turn);
  showTurns();
  announce("Answering.");
  await streamAnswer(body, turn, mine.signal, showLastSoon);
  if (running !== mine) return; // the conversation was cleared
  running = null;
  showLast();
  showControls();
  keep();
  announce(turn.error?.message ?? `Answer: ${turn.content}`);
}

/** Forget everything from turn `index` on, say `replaced` instead, ask again. */
function answerFrom(index, ...replaced) {
  turns = [...turns.slice(0, index), ...replaced];
  answer();
}

function clear() {
  running?.abort();
  running = null;
  turns = [];
  showTurns();
  byId("draft").focus();
}

const keep = () => remember(STORE, turns);

// ---- what is seen

function showTurns() {
  keep();
  views = turns.map((turn, index) =>
    turnView(turn, {
      edit: (content) => answerFrom(index, { role: "user", content }),
      regenerate: () => answerFrom(index),
    }),
  );
  showAll();
  byId("turns").replaceChildren(...views.map((view) => view.element));
  byId("welcome").hidden = turns.length > 0;
  showControls();
  toEnd();
}

function showAll() {
  const asMarkdown = byId("markdown").checked;
  views.forEach((view, index) => {
    view.update({ live: running !== null && index === views.length - 1, asMarkdown });
  });
}

/** The last turn as it is now; who reads further up is left there. */
function showLast() {
  const { scrollHeight, scrollTop, clientHeight } = byId("scroller");
  const follows = scrollHeight - scrollTop - clientHeight < 40;
  views.at(-1)?.update({ live: running !== null, asMarkdown: byId("markdown").checked });
  if (follows) toEnd();
}

/** The same once a frame at most, and in a fifth of the time where that is slow. */
const showLastSoon = (() => {
  let asked = false;
  let notBefore = 0;
  const frame = (now) => {
    if (now < notBefore) return requestAnimationFrame(frame);
    asked = false;
    const started = performance.now();
    showLast();
    notBefore = now + 4 * (performance.now() - started);
  };
  return () => {
    if (!asked) requestAnimationFrame(frame);
    asked = true;
  };
})();

const toEnd = () => (byId("scroller").scrollTop = byId("scroller").scrollHeight);

function showControls() {
  byId("turns").classList.toggle("busy", running !== null);
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("send").disabled = !canSend() || !byId("draft").value.trim();
}

const canSend = () => ready && !running && byId("model").value !== "";

/** For screen readers: the answer as a whole, not each piece of it. */
const announce = (text) => (byId("announcer").textContent = text);

// ---- the server

async function showModels() {
  try {
    const { data } = await requestJson("v1/models");
    byId("model").replaceChildren(...data.map(({ id }) => element("option", {}, id)));
    byId("welcome-model").textContent = data[0].id;
    suggestMemory(data[0].id !== SHIPPED_MODEL);
    byId("welcome-facts").textContent =
      `Up to ${data[0].max_model_len.toLocaleString("en")} tokens, question and answer together.`;
    locked = false;
  } catch (error) {
    locked = needsKey(error);
    toast(error.message);
  }
  showControls();
}

function onReadiness({ detail }) {
  ready = detail?.status === "ok";
  byId("loading").hidden = ready;
  if (!ready) {
    byId("stage").textContent = detail?.stage ?? "The server does not answer.";
    byId("progress").max = detail?.total || 1;
    if (detail?.total) byId("progress").value = detail.done;
    else byId("progress").removeAttribute("value");
  }
  if (ready && !locked && !byId("model").length) showModels();
  showControls();
}

// ---- code

function showCode() {
  const draft = byId("draft").value.trim();
  const said = turns.slice(0, turns.findLastIndex((turn) => turn.role === "user") + 1);
  const shown = draft ? [...turns, { role: "user", content: draft }] : said;
  const body = requestBody(shown.length ? shown : [{ role: "user", content: SUGGESTIONS[0] }]);
  const base = new URL("v1", root).href;
  byId("curl").textContent = curlSample(base, body, apiKey.get() !== "");
  byId("python").textContent = pythonSample(base, body, apiKey.get() !== "");
  byId("code").showModal();
}

// ---- what people do

function listen() {
  const draft = byId("draft");
  byId("composer").onsubmit = (event) => {
    event.preventDefault();
    if (byId("send").disabled) return;
    const text = draft.value;
    draft.value = "";
    send(text);
  };
  draft.onkeydown = (event) => {
    if (sends(event)) byId("composer").requestSubmit();
  };
  draft.oninput = showControls;
  byId("stop").onclick = () => running.abort();
  document.addEventListener("keydown", (event) => {
    const covered = document.querySelector(":modal, :popover-open");
    if (event.key === "Escape" && !covered) running?.abort();
  });
  byId("clear").onclick = clear;
  byId("markdown").onchange = showAll;
  byId("show-code").onclick = showCode;
  byId("close-code").onclick = () => byId("code").close();
  for (const button of document.querySelectorAll("[data-copies]")) {
    button.onclick = () => copyText(byId(button.dataset.copies).textContent);
  }
  byId("show-settings").onclick = ({ target }) => {
    target.ariaExpanded = String(byId("settings").classList.toggle("open"));
  };
  byId("settings").onsubmit = (event) => event.preventDefault();
  document.addEventListener("shoal:ready", onReadiness);
  document.addEventListener("shoal:key", showModels);
  addEventListener("pagehide", keep);
}

function suggest(text) {
  return element("button", { type: "button", onclick: () => canSend() && send(text) }, text);
}

restoreSettings();
listen();
byId("suggestions").append(...SUGGESTIONS.map(suggest));
showTurns();
mountTop("chat");
