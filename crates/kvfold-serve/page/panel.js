// The panel beside the conversation: the cache of one answer, live and afterwards.

import { perFrame } from "./answer.js";
import { Chart } from "./chart.js";
import { byId } from "./dom.js";
import { bytes, count, mean, ratio } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { TraceView } from "./traceview.js";

export class Panel {
  #answer = null;
  #chart = new Chart(byId("chart"));
  #heat = new HeatMap();
  #trace = new TraceView();
  #allHeads = byId("all-heads");
  #draw = perFrame(() => this.#drawNow());

  constructor() {
    this.#heat.addEventListener("choose", () => {
      this.#trace.choose(this.#heat.chosen);
      this.#allHeads.setAttribute("aria-pressed", `${this.#heat.chosen === null}`);
    });
    this.#trace.addEventListener("token", () => this.#dot());
    this.#allHeads.addEventListener("click", () => this.#heat.choose(null));
    this.#draw();
  }

  /** Follows an answer; null empties the panel. */
  show(answer) {
    this.#answer?.removeEventListener("change", this.#draw);
    this.#answer = answer;
    answer?.addEventListener("change", this.#draw);
    this.#draw();
  }

  #drawNow() {
    const answer = this.#answer;
    const cache = answer?.cache ?? {};
    byId("cache-of").textContent = answer?.name ?? "No answer yet";
    byId("tokens-seen").textContent = count(cache.tokens_seen);
    byId("slots-held").textContent = mean(cache.slots_held);
    byId("logical").textContent = ratio(cache.tokens_seen, cache.slots_held);
    byId("physical").textContent = ratio(cache.dense_kv_bytes, cache.kv_bytes);
    this.#drawBytes(cache);
    byId("engaged").hidden = cache.engaged !== false;
    byId("engaged").textContent = answer?.enabled
      ? "The cache could not compress: every token keeps its slot."
      : "The full cache: every token keeps its slot.";
    this.#chart.draw(answer?.points ?? []);
    if (answer) this.#heat.draw(answer.heads, cache.tokens_seen);
    else this.#heat.clear();
    this.#allHeads.hidden = !answer?.heads;
    this.#trace.show(answer?.trace ?? null, this.#whyNoTrace());
    this.#dot();
  }

  #drawBytes({ kv_bytes: held, dense_kv_bytes: dense }) {
    const most = Math.max(held ?? 0, dense ?? 0, 1);
    byId("kv-bytes").textContent = bytes(held);
    byId("dense-bytes").textContent = bytes(dense);
    byId("held-bar").style.width = `${((held ?? 0) / most) * 100}%`;
    byId("dense-bar").style.width = `${((dense ?? 0) / most) * 100}%`;
  }

  #whyNoTrace() {
    const answer = this.#answer;
    if (!answer || answer.running) return "Token by token, after an answer.";
    if (!answer.enabled) return "The full cache folds and evicts nothing.";
    return "An answer that did not end by itself has no trace.";
  }

  /** Dots the heads that folded or evicted the token of interest. */
  #dot() {
    const token = this.#trace.token;
    const trace = this.#answer?.trace;
    this.#heat.dot((layer, head) => Boolean(trace) && token !== null && trace.gone(layer, head, token));
  }
}
