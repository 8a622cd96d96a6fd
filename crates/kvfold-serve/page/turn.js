// What was asked and what was answered, once or twice, with the place where two answers part.

import { perFrame } from "./answer.js";
import { element } from "./dom.js";
import { firstDifference, wordAt } from "./folds.js";
import { bytes, count, ratio } from "./format.js";

/** What stands where an answer has no text, by its state. */
const PLACEHOLDERS = { waiting: "Reading the prompt…", done: "The answer has no text." };

class AnswerView {
  #answer;
  #text = element("p", { className: "text", data: { testid: "answer-text" } });
  #error = element("p", { className: "error", hidden: true, data: { testid: "error" } });
  #facts = element("span", { data: { testid: "facts" } });
  #footer;

  constructor(answer, title, buttons) {
    this.#answer = answer;
    this.#error.setAttribute("role", "alert");
    this.#footer = element("footer", { className: "dim small" }, this.#facts, ...buttons);
    const name = answer.enabled ? "held" : "full";
    this.element = element(
      "article",
      { className: `answer ${name}`, data: { testid: `answer-${name}` } },
      element("h3", {}, title),
      this.#text,
      this.#error,
      this.#footer,
    );
  }

  draw(difference) {
    const { state, text, error } = this.#answer;
    this.element.dataset.state = state;
    const placeholder = text === "" ? PLACEHOLDERS[state] : undefined;
    this.#text.replaceChildren(...(placeholder ? [placeholder] : marked(text, difference)));
    this.#text.classList.toggle("placeholder", placeholder !== undefined);
    this.#text.hidden = text === "" && !placeholder;
    this.#error.hidden = !error;
    this.#error.textContent = error?.text ?? error?.message ?? "";
    this.#facts.textContent = this.#describe();
    this.#footer.hidden = state === "waiting" || (state === "failed" && text === "");
  }

  #describe() {
    const { state, finish, usage, cache, seed, speed } = this.#answer;
    const facts = [];
    if (state === "stopped") facts.push("stopped");
    if (finish === "length") facts.push("ended at max tokens");
    if (usage) facts.push(`${count(usage.completion_tokens)} tokens`);
    if (speed) facts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`);
    if (cache) facts.push(bytes(cache.kv_bytes));
    if (cache && this.#answer.enabled) facts.push(`${ratio(cache.dense_kv_bytes, cache.kv_bytes)} physical`);
    facts.push(`seed ${seed}`);
    return facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");
  }
}

/** A text in nodes, with the word that differs in a `mark`. */
function marked(text, difference) {
  if (difference === null) return [text];
  const [start, end] = wordAt(text, difference);
  const mark = element("mark", { data: { testid: "difference" } }, text.slice(start, end));
  return [text.slice(0, start), mark, text.slice(end)];
}

export class Turn {
  #note = element("p", { className: "difference dim small", hidden: true, data: { testid: "difference-note" } });
  #views;
  #draw = perFrame(() => this.#drawNow());

  /** `full` is null where nothing is compared. `actions`: {show(answer), again(turn), further(turn)}. */
  constructor({ kind, prompt, held, full }, actions) {
    this.kind = kind;
    this.prompt = prompt;
    this.held = held;
    this.full = full;
    this.again = element("button", { type: "button", hidden: true, data: { testid: "again" } }, "Send again");
    this.again.addEventListener("click", () => actions.again(this));
    this.further = element("button", { type: "button", hidden: true, data: { testid: "further" } }, "Continue further");
    this.further.addEventListener("click", () => actions.further(this));

    const answers = [held, full].filter(Boolean);
    this.shows = answers.map((answer) => {
      const button = element("button", { type: "button", data: { testid: "show-cache" } }, "Show cache");
      button.addEventListener("click", () => actions.show(answer));
      return { answer, button };
    });
    const one = kind === "chat" ? "Answer" : "Continuation";
    const titles = full ? ["Compressed cache", "Full cache"] : [one];
    this.#views = answers.map((answer, i) => {
      answer.addEventListener("change", this.#draw);
      const further = answer === held ? [this.further] : [];
      return new AnswerView(answer, titles[i], [this.shows[i].button, ...further]);
    });
    this.element = element(
      "li",
      { className: "turn", data: { testid: "turn" } },
      element(
        "article",
        { className: "asked" },
        element("h3", {}, kind === "chat" ? "You" : "Text"),
        element("p", { className: "text", data: { testid: "asked" } }, prompt),
      ),
      element("div", { className: full ? "answers two" : "answers" }, ...this.#views.map((view) => view.element)),
      this.#note,
      this.again,
    );
    this.#drawNow();
  }

  get failed() {
    return this.held.state === "failed" && this.held.text === "";
  }

  /** Says which answer the panel shows. */
  showing(shown) {
    for (const { answer, button } of this.shows) button.setAttribute("aria-pressed", `${answer === shown}`);
  }

  #drawNow() {
    const difference = this.#difference();
    for (const view of this.#views) view.draw(difference);
    this.again.hidden = !this.failed;
    this.further.hidden = this.kind !== "text" || this.held.running || this.failed;
  }

  #difference() {
    if (!this.full) return null;
    const ended = this.held.state === "done" && this.full.state === "done";
    const at = firstDifference(this.held.text, this.full.text, ended);
    this.#note.hidden = at === null && !ended;
    this.#note.textContent =
      at === null
        ? "The two answers are the same."
        : `The answers first differ after ${count(at)} characters, at the marked word.`;
    return at;
  }
}
