// One answer while it grows: its text, and what the cache says of it. Views listen to `change`.

import { stream } from "./api.js";
import { Trace } from "./folds.js";

export class Answer extends EventTarget {
  constructor({ name, seed, enabled }) {
    super();
    this.name = name;
    this.seed = seed;
    /** False for the full cache. */
    this.enabled = enabled;
    /** waiting, running, done, stopped or failed */
    this.state = "waiting";
    this.text = "";
    this.error = null;
    this.finish = null;
    this.usage = null;
    /** The newest counters: tokens_seen, slots_held, kv_bytes, dense_kv_bytes; engaged at the end. */
    this.cache = null;
    /** The newest slots: [layer][head]. */
    this.heads = null;
    /** {time, tokens, slots}; time in seconds since the request was sent. */
    this.points = [];
    this.trace = null;
    this.sent = performance.now();
    this.times = { first: null, last: null };
  }

  get running() {
    return this.state === "waiting" || this.state === "running";
  }

  /** Tokens per second after the first, null where nothing was measured. */
  get speed() {
    const tokens = this.usage?.completion_tokens;
    const { first, last } = this.times;
    return tokens > 1 && last > first ? ((tokens - 1) / (last - first)) * 1000 : null;
  }

  /** Streams from the server until the answer has ended in one way or another. */
  async run(path, body, signal) {
    try {
      for await (const chunk of stream(path, body, signal)) this.#take(chunk);
      this.#end("done");
    } catch (cause) {
      if (cause.name === "AbortError") {
        this.#end("stopped");
      } else {
        this.error = cause;
        this.#end("failed");
      }
    }
  }

  #take(chunk) {
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (text) {
      this.state = "running";
      this.text += text;
      this.times.last = performance.now();
      this.times.first ??= this.times.last;
    }
    this.finish = choice?.finish_reason ?? this.finish;
    const { heads, trace, ...live } = chunk.kvfold ?? {};
    if (live.tokens_seen !== undefined) this.#count(live);
    if (heads) this.heads = heads;
    if (trace) this.trace = new Trace(trace);
    if (chunk.usage) {
      this.usage = chunk.usage;
      if (chunk.usage.kvfold) this.#count(chunk.usage.kvfold);
    }
    this.#changed();
  }

  #count(cache) {
    this.cache = { ...this.cache, ...cache };
    this.points.push({
      time: (performance.now() - this.sent) / 1000,
      tokens: cache.tokens_seen,
      slots: cache.slots_held,
    });
  }

  #end(state) {
    this.state = state;
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** A function that has `draw` called once before the next frame, however often it is called itself. */
export function perFrame(draw) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      draw();
    });
  };
}
