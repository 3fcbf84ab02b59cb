// What all pages share: the API with its key, event streams, theme, toasts, the top of the page.
// Text from outside goes in as text only; pages have no inline script or style, and no innerHTML.

/** Where the server's paths begin, whatever prefix a proxy puts before them. */
export const root = new URL("..", import.meta.url);

// ---- elements

/** `element("p", { className: "muted" }, "text", child)`: properties, or else attributes. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** The element of this id. */
export const byId = (id) => document.getElementById(id);

// ---- what the browser keeps, if it lets pages keep anything

/** What this tab keeps under a name; `otherwise` if that is nothing, or nothing of its kind. */
export function recall(name, otherwise) {
  try {
    const found = JSON.parse(sessionStorage.getItem(name));
    return found?.constructor === otherwise.constructor ? found : otherwise;
  } catch {
    return otherwise;
  }
}

/** For a reload; what is too long for the browser's store lives as long as the page. */
export function remember(name, value) {
  try {
    sessionStorage.removeItem(name);
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Too long, or not allowed.
  }
}

// ---- API

/** An answer that is an error; `status` 0: there was no answer. */
export class ApiError extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Whether a request failed for want of a key, or of a better one. */
export const needsKey = ({ status }) => status === 401 || status === 403;

let key = recall("shoal.key", "");

/** The API key, kept until the tab closes. */
export const apiKey = {
  get: () => key,
  set(given) {
    key = given;
    remember("shoal.key", key);
  },
};

/**
 * The response to a request of `path` ("v1/models"), with `body` as JSON if there is one.
 * Throws ApiError, and AbortError once `signal` says so; a missing key opens the key's form.
 */
export async function request(path, { method, body, signal } = {}) {
  const headers = {};
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(new URL(path, root), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("shoal:key-needed"));
  throw await errorOf(response);
}

/** The JSON answer to a request, see `request`. */
export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

async function errorOf(response) {
  const text = await response.text();
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(message, response.status, code);
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`.trim(), response.status);
  }
}

/**
 * The data of each server-sent event of a response, parsed, up to [DONE]. Throws ApiError at an
 * error event and at an end without [DONE]. Leaving the loop closes the connection.
 */
export async function* eventsOf(response) {
  for await (const line of linesOf(response.body)) {
    if (!line.startsWith("data:")) continue; // a comment keeps the connection alive
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, response.status, event.error.code);
    yield event;
  }
  throw new ApiError("The answer broke off.");
}

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      yield* lines;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke.");
  } finally {
    reader.cancel().catch(() => {}); // nobody is left to tell
  }
}

// ---- theme

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : darkSystem.matches;
}

/** A colour of common.css as canvases take it: `colour("--accent")`. Changes at shoal:theme. */
export function colour(name) {
  const probe = element("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  tellTheme();
  try {
    localStorage.setItem("shoal.theme", theme);
  } catch {
    // Not allowed: it lives as long as the page.
  }
}

const tellTheme = () => document.dispatchEvent(new CustomEvent("shoal:theme"));

// ---- toasts

/** A message in the corner that somebody closes or that goes by itself; kind: "bad" or "good". */
export function toast(message, kind = "bad") {
  const shown = element("div", { className: `toast card ${kind}` }, element("p", {}, message));
  const close = element("button", { className: "quiet", ariaLabel: "Close" }, "✕");
  close.onclick = () => shown.remove();
  shown.append(close);
  toasts.append(shown);
  setTimeout(() => shown.remove(), kind === "good" ? 2000 : 8000);
}

const toasts = element("div", { className: "toasts", role: "alert" });

// ---- clipboard

/** Copy, also where the page came over plain HTTP and browsers hide their clipboard. */
export async function copyText(text) {
  const written = navigator.clipboard?.writeText(text).then(
    () => true,
    () => false,
  );
  if ((await written) || copySelected(text)) toast("Copied.", "good");
  else toast("The browser lets no page copy: select the text.");
}

function copySelected(text) {
  const field = element("textarea", { value: text, className: "unseen" });
  (document.querySelector(":modal") ?? document.body).append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}

// ---- the top of the page

/**
 * Fills `<header class="top">`; `page`: "chat" or "experts". Watches whether the server is ready:
 * event shoal:ready has /readyz in its detail ({status, stage, done, total}; null: no answer).
 */
export function mountTop(page) {
  const link = (name, path) => {
    const made = element("a", { href: new URL(path, root).href }, name);
    if (name.toLowerCase() === page) made.ariaCurrent = "page";
    return made;
  };
  const logo = element("img", { src: new URL("assets/shoal.svg", root).href, alt: "" });
  const theme = element("button", { className: "quiet", title: "Light or dark" }, "◐");
  theme.ariaLabel = "Switch between light and dark";
  theme.onclick = switchTheme;
  document.querySelector("header.top").append(
    element("div", { className: "brand" }, logo, element("span", {}, "Shoal")),
    element("nav", { ariaLabel: "Pages" }, link("Chat", "."), link("Experts", "experts")),
    stateLine(),
    element("div", { className: "tools" }, ...keyForm(), theme),
  );
  document.body.append(toasts);
  darkSystem.addEventListener("change", tellTheme);
  watchReadiness();
}

function stateLine() {
  const dot = element("span", { className: "dot" });
  const text = element("span", {}, "…");
  document.addEventListener("shoal:ready", ({ detail }) => {
    dot.className = `dot ${detail === null ? "bad" : detail.status === "ok" ? "good" : "warn"}`;
    text.textContent = detail === null ? "no answer" : detail.status.replace("ok", "ready");
  });
  return element("div", { className: "state small muted", role: "status" }, dot, text);
}

function keyForm() {
  const field = element("input", { type: "password", autocomplete: "off", id: "api-key" });
  const save = element("button", { className: "primary" }, "Use");
  const forget = element("button", { type: "button" }, "Forget");
  const form = element(
    "form",
    { method: "dialog" },
    element("label", { htmlFor: "api-key" }, "API key"),
    field,
    element("p", { className: "small muted" }, "Kept in this tab only, until it is closed."),
    element("div", { className: "row" }, save, forget),
  );
  const popover = element("div", { className: "key-form card", popover: "auto" }, form);
  const opener = element("button", { className: "quiet", popoverTargetElement: popover }, "Key");
  const show = () => (opener.textContent = apiKey.get() ? "Key ✓" : "Key");
  const use = (key) => {
    apiKey.set(key.trim());
    popover.hidePopover();
    show();
    document.dispatchEvent(new CustomEvent("shoal:key"));
  };
  popover.addEventListener("toggle", ({ newState }) => {
    field.value = apiKey.get();
    if (newState === "open") field.focus();
  });
  form.onsubmit = (event) => {
    event.preventDefault();
    use(field.value);
  };
  forget.onclick = () => use("");
  document.addEventListener("shoal:key-needed", () => popover.showPopover());
  show();
  return [opener, popover];
}

const SOON_MS = 1000;
const LATER_MS = 10000;

/** Asks every second until the server is ready, and now and then afterwards. */
async function watchReadiness() {
  let detail = null;
  try {
    const response = await fetch(new URL("readyz", root)); // its 503 is an answer too
    detail = await response.json();
  } catch {
    detail = null;
  }
  document.dispatchEvent(new CustomEvent("shoal:ready", { detail }));
  setTimeout(watchReadiness, detail?.status === "ok" ? LATER_MS : SOON_MS);
}
