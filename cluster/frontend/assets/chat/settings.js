// The fields beside the conversation: kept in the tab, read into requests.

import { byId, recall, remember } from "../common.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const TEXTS = [...NUMBERS, "system", "stop_strings"];
const CHECKS = ["memory", "markdown"];
const STORE = "shoal.settings";

let kept = recall(STORE, {});

/** Fill the fields with what they had before, and keep what is changed. */
export function restoreSettings() {
  for (const name of TEXTS) byId(name).value = kept[name] ?? "";
  for (const name of CHECKS) byId(name).checked = kept[name] ?? true;
  byId("settings").addEventListener("input", () => {
    kept = {};
    for (const name of TEXTS) kept[name] = byId(name).value;
    for (const name of CHECKS) kept[name] = byId(name).checked;
    remember(STORE, kept);
  });
}

/** Whether requests carry what was said before, if nobody has decided yet. */
export function suggestMemory(memory) {
  byId("memory").checked = kept.memory ?? memory;
}

/** Body of a request for the next turn; fields left empty are the server's to choose. */
export function requestBody(turns) {
  const system = byId("system").value.trim();
  const said = turns.filter((turn) => turn.content).slice(byId("memory").checked ? 0 : -1);
  const body = {
    model: byId("model").value,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...said.map(({ role, content }) => ({ role, content })),
    ],
  };
  for (const name of NUMBERS) {
    const field = byId(name);
    if (field.value !== "") body[name] = field.valueAsNumber;
  }
  const lines = byId("stop_strings").value.split("\n").filter(Boolean);
  const stop = lines.map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) body.stop = stop;
  return { ...body, stream: true, stream_options: { include_usage: true }, timing: true };
}
