// The fields beside the conversation: kept in the tab, read into requests.

import { byId } from "../common.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const KEPT = [...NUMBERS, "system", "stop_strings"];
const STORE = "shoal.settings";

/** Fill the fields with what they had before, and keep what is typed. */
export function restoreSettings() {
  const kept = JSON.parse(sessionStorage.getItem(STORE) ?? "{}");
  for (const name of KEPT) byId(name).value = kept[name] ?? "";
  byId("settings").addEventListener("input", () => {
    const now = Object.fromEntries(KEPT.map((name) => [name, byId(name).value]));
    sessionStorage.setItem(STORE, JSON.stringify(now));
  });
}

/** Body of a request for the next turn; fields left empty are the server's to choose. */
export function requestBody(turns) {
  const system = byId("system").value.trim();
  const said = turns.filter((turn) => turn.content);
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
