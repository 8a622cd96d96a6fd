// The page: what is typed becomes a request, its answer a turn of the conversation, its cache the panel. All state is
// here and in memory; nothing outlives the page.

import { Answer } from "./answer.js";
import { get } from "./api.js";
import { byId } from "./dom.js";
import { Panel } from "./panel.js";
import { Turn } from "./turn.js";

const composer = byId("composer");
const form = byId("composer-form");
const scroll = byId("scroll");
const panel = new Panel();

const page = {
  model: null,
  /** @type {Turn[]} */
  turns: [],
  /** Aborts what runs now; null when nothing does. */
  running: null,
};

// What is sent.

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function setMode(value) {
  document.querySelector(`input[name=mode][value=${value}]`).checked = true;
  const chat = value === "chat";
  composer.placeholder = chat ? "Message" : "Text to continue";
  byId("composer-label").textContent = composer.placeholder;
  byId("send").textContent = chat ? "Send" : "Continue";
  byId("system-details").hidden = !chat;
}

function settings() {
  const seed = byId("seed").value;
  return {
    temperature: byId("temperature").valueAsNumber,
    max_tokens: byId("max-tokens").valueAsNumber,
    seed: seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(seed),
  };
}

/** The conversation so far and a new message, as chat messages. Both caches answer the same ones. */
function messages(text) {
  const system = byId("system").value.trim();
  const said = page.turns
    .filter((turn) => turn.kind === "chat" && !turn.failed)
    .flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.held.text },
    ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: text }];
}

async function send(text) {
  if (text.trim() === "" || page.running || !form.reportValidity()) return;
  const kind = mode();
  // A turn that failed gave its text back; what is sent now stands in its place.
  for (const turn of page.turns.filter((turn) => turn.failed)) turn.element.remove();
  page.turns = page.turns.filter((turn) => !turn.failed);

  const set = settings();
  const what = kind === "chat" ? { messages: messages(text) } : { prompt: text };
  const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const body = (enabled) => ({
    model: page.model,
    ...what,
    ...set,
    stream: true,
    stream_options: { include_usage: true },
    kvfold: { enabled, live: true, trace: enabled },
  });
  const number = page.turns.length + 1;
  const held = new Answer({ name: `Answer ${number}`, seed: set.seed, enabled: true });
  const full = byId("compare").checked
    ? new Answer({ name: `Answer ${number}, full cache`, seed: set.seed, enabled: false })
    : null;
  const turn = new Turn({ kind, prompt: text, held, full }, { show, again, further });
  page.turns.push(turn);
  byId("messages").append(turn.element);
  byId("empty").hidden = true;
  scroll.scrollTop = scroll.scrollHeight;
  show(held);
  notice("");

  page.running = new AbortController();
  showRunning();
  const { signal } = page.running;
  await Promise.all([held, full].filter(Boolean).map((answer) => answer.run(path, body(answer.enabled), signal)));
  if (page.running?.signal === signal) page.running = null;
  showRunning();
  ended(turn);
}

function ended(turn) {
  if (!page.turns.includes(turn)) return;
  const { held } = turn;
  if (turn.failed && composer.value === "") composer.value = turn.prompt;
  if (turn.failed && turn.kind === "chat" && held.error.code === "no_chat_template") {
    withoutTemplate();
  }
  const said = { done: "The answer is complete.", stopped: "The answer was stopped.", failed: "" };
  byId("said").textContent = said[held.state];
}

function withoutTemplate() {
  setMode("text");
  notice("This model has no chat template, so it continues text instead of answering messages.");
}

// What a turn's buttons do.

function show(answer) {
  panel.show(answer);
  for (const turn of page.turns) turn.showing(answer);
}

function again(turn) {
  if (composer.value === turn.prompt) composer.value = "";
  setMode(turn.kind);
  send(turn.prompt);
}

function further(turn) {
  setMode("text");
  send(turn.prompt + turn.held.text);
}

function stop() {
  page.running?.abort();
}

function newChat() {
  stop();
  page.turns = [];
  byId("messages").replaceChildren();
  byId("empty").hidden = false;
  notice("");
  show(null);
  composer.focus();
}

// What is shown beside the turns.

/** Stop stands where Send does while something runs, and takes the focus over and back. */
function showRunning() {
  const [shown, hidden] = page.running ? [byId("stop"), byId("send")] : [byId("send"), byId("stop")];
  shown.hidden = false;
  if (document.activeElement === hidden) shown.focus();
  hidden.hidden = true;
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = text === "";
}

/** Keeps the end of the conversation in sight while it grows, unless somebody scrolled up. */
function follow() {
  let atEnd = true;
  scroll.addEventListener("scroll", () => {
    atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
  });
  new ResizeObserver(() => {
    if (atEnd) scroll.scrollTop = scroll.scrollHeight;
  }).observe(byId("messages"));
}

// At the start.

async function start() {
  try {
    const [models, version] = await Promise.all([get("v1/models"), get("version")]);
    const model = models.data[0];
    page.model = model.id;
    byId("model").textContent = model.id;
    byId("version").textContent = version.version;
    document.title = `${model.id} - kvfold`;
    if (model.kvfold?.chat === false) withoutTemplate();
  } catch (error) {
    byId("model").textContent = "no model";
    byId("page-error").textContent = error.text ?? error.message;
    byId("page-error").hidden = false;
    return;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (page.running) return;
  const text = composer.value;
  if (text.trim() === "" || !form.reportValidity()) return;
  composer.value = "";
  send(text);
});

composer.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.altKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && page.running) {
    event.preventDefault();
    stop();
  }
});

byId("modes").addEventListener("change", () => setMode(mode()));
byId("system").addEventListener("input", () => {
  byId("system-state").textContent = byId("system").value.trim() ? " (set)" : "";
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", newChat);

setMode(mode());
follow();
composer.focus();
start();
