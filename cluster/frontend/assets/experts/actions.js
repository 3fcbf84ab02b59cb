// What can be done to a worker: asked back first, then sent.

import { byId, requestJson, toast } from "../common.js";

const ACTIONS = {
  kill: {
    name: "Kill",
    text: "Its process ends at once, as by SIGKILL. Streams go on; a new worker takes its place.",
    path: "v1/chaos",
    body: (id, kind) => ({ action: "kill", role: kind, worker: id }),
  },
  drain: {
    name: "Drain",
    text: "It hands its experts over to the other workers and stays without any.",
    path: "v1/experts/drain",
    body: (id) => ({ worker: id }),
  },
};

/** Kill or drain a worker; what was done, or "". kind: the worker's role as the API calls it. */
export async function act(action, worker, kind) {
  const { name, text, path, body } = ACTIONS[action];
  const id = worker.worker_id;
  if (!(await isConfirmed(`${name} ${id}?`, text, name))) return "";
  try {
    return (await requestJson(path, { body: body(id, kind) })).done;
  } catch (error) {
    toast(`${name} ${id}: ${error.message}`);
    return "";
  }
}

function isConfirmed(title, text, name) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-go").textContent = name;
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((decide) => {
    dialog.addEventListener("close", () => decide(dialog.returnValue === "go"), { once: true });
  });
}
