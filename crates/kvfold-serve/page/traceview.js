// A trace, token by token. Pointing at a token, or moving to it with the arrow keys, shows what shares its slot.

import { byId, element } from "./dom.js";
import { count, headName } from "./format.js";

/** Of a longer slot only so many tokens are named. */
const MOST_NAMED = 6;

export class TraceView extends EventTarget {
  #place = byId("tokens");
  #detail = byId("trace-detail");
  #legend = byId("trace-legend");
  #blank = byId("trace-blank");
  #spans = [];
  #trace = null;
  #head = null;
  /** The token that the keys are at, and the one that is pointed at. */
  #current = null;
  #pointed = null;
  #lit = null;

  constructor() {
    super();
    this.#place.addEventListener("pointerover", (event) => this.#point(tokenOf(event.target)));
    this.#place.addEventListener("pointerleave", () => this.#point(null));
    this.#place.addEventListener("click", (event) => this.#goTo(tokenOf(event.target)));
    this.#place.addEventListener("keydown", (event) => this.#pressed(event));
    this.#place.addEventListener("focus", () => {
      if (this.#place.matches(":focus-visible")) this.#goTo(this.#current ?? 0);
    });
  }

  /** The token whose heads are of interest, null for none. */
  get token() {
    return this.#pointed ?? this.#current;
  }

  /** Shows a trace, or says why there is none. */
  show(trace, why) {
    const shown = trace !== null;
    this.#blank.textContent = why;
    this.#blank.hidden = shown;
    for (const part of [this.#place, this.#detail, this.#legend]) part.hidden = !shown;
    if (trace === this.#trace) return;
    this.#trace = trace;
    this.#current = this.#pointed = this.#lit = null;
    this.#place.removeAttribute("aria-activedescendant");
    this.#spans = (trace?.tokens ?? []).map((text, token) => {
      const span = element("span", { id: `token-${token}`, data: { testid: "token", token } }, visible(text));
      span.setAttribute("role", "option");
      return span;
    });
    this.#place.replaceChildren(...this.#spans);
    this.#paint();
  }

  /** Shows the slots of one head, or of all with null. */
  choose(head) {
    this.#head = head;
    this.#paint();
  }

  #paint() {
    const trace = this.#trace;
    if (!trace) return;
    const classes = trace.tokens.map((_, token) => (trace.undecided(token) ? "token undecided" : "token"));
    if (this.#head) {
      this.#ground(classes);
    } else {
      const heads = trace.layers * trace.heads;
      this.#spans.forEach((span, token) => {
        const share = trace.goneIn(token) / heads;
        span.style.setProperty("--share", `${share * 100}%`);
        if (share > 0) classes[token] += " shaded";
      });
    }
    this.#spans.forEach((span, token) => {
      span.className = classes[token];
    });
    this.#legend.textContent = this.#explain();
    this.#lit = null;
    this.#light();
  }

  /** What one head did: slots of several tokens on a ground of their own, two grounds in turn; evicted ones struck. */
  #ground(classes) {
    const { layer, head } = this.#head;
    let odd = false;
    for (const { first, last } of this.#trace.slots(layer, head)) {
      if (first === last) continue;
      for (let token = first; token <= last; token += 1) {
        if (this.#trace.evicts) {
          if (token < last) classes[token] += " evicted";
        } else {
          classes[token] += odd ? " fold odd" : " fold";
        }
      }
      classes[first] += " first";
      classes[last] += " last";
      odd = !odd;
    }
  }

  #explain() {
    const { method, delay, evicts } = this.#trace;
    if (!method) return "This model's cache keeps every token.";
    const undecided = delay > 0 ? ` The newest ${count(delay)} are not decided yet (dotted).` : "";
    if (!this.#head) {
      const what = evicts ? "evicted a token" : "folded a token into the one before it";
      return `The stronger the shade, the more heads ${what}. Choose a head above to see its slots.${undecided}`;
    }
    const name = headName(this.#head);
    const what = evicts ? `What ${name} evicted is struck out.` : `Tokens on one ground share a slot of ${name}.`;
    return `${what}${undecided}`;
  }

  #point(token) {
    this.#pointed = token;
    this.#light();
  }

  #goTo(token) {
    if (token === null || !this.#trace) return;
    this.#spans[this.#current]?.setAttribute("aria-selected", "false");
    this.#current = token;
    const span = this.#spans[token];
    span.setAttribute("aria-selected", "true");
    span.setAttribute("aria-label", this.#describe(token));
    this.#place.setAttribute("aria-activedescendant", span.id);
    this.#scrollTo(span);
    this.#light();
  }

  #scrollTo(span) {
    const top = span.offsetTop - this.#place.offsetTop;
    const { scrollTop, clientHeight } = this.#place;
    if (top < scrollTop) this.#place.scrollTop = top - 8;
    const over = top + span.offsetHeight - clientHeight;
    if (over > scrollTop) this.#place.scrollTop = over + 8;
  }

  /** Marks the token of interest and all that share its slot in the chosen head. */
  #light() {
    const token = this.token;
    for (let t = this.#lit?.first ?? 0; t <= (this.#lit?.last ?? -1); t += 1) {
      this.#spans[t].classList.remove("lit", "at");
    }
    this.#lit = null;
    if (token !== null) {
      this.#lit = this.#head
        ? this.#trace.slotOf(this.#head.layer, this.#head.head, token)
        : { first: token, last: token };
      for (let t = this.#lit.first; t <= this.#lit.last; t += 1) this.#spans[t].classList.add("lit");
      this.#spans[token].classList.add("at");
    }
    this.#detail.textContent = token === null ? "Point at a token, or use the arrow keys." : this.#describe(token);
    this.#detail.classList.toggle("dim", token === null);
    this.dispatchEvent(new Event("token"));
  }

  #describe(token) {
    const name = `${this.#name(token)} (token ${token})`;
    if (!this.#trace.method) return `${name} has a slot of its own.`;
    if (this.#trace.undecided(token)) return `${name} is not decided yet and has a slot of its own.`;
    return this.#head ? this.#describeSlot(token, name) : this.#describeHeads(token, name);
  }

  #describeHeads(token, name) {
    const { evicts, layers, heads } = this.#trace;
    const gone = this.#trace.goneIn(token);
    const did = evicts ? "evicted" : "folded into the token before it";
    if (gone === 0) return `${name} is kept by every head.`;
    return `${name} is ${did} by ${gone} of ${layers * heads} heads.`;
  }

  #describeSlot(token, name) {
    const head = headName(this.#head);
    const { first, last } = this.#trace.slotOf(this.#head.layer, this.#head.head, token);
    if (first === last) return `${name} has a slot of its own in ${head}.`;
    if (!this.#trace.evicts) {
      return `${name} shares one slot of ${head} with ${this.#names(first, last, token)} (tokens ${first} to ${last}).`;
    }
    if (token < last) return `${name} is evicted by ${head}; ${this.#name(last)} (token ${last}) has its slot.`;
    return `${name} is kept by ${head} and has the slot of ${this.#names(first, last, token)}, evicted.`;
  }

  #names(first, last, without) {
    const others = [];
    for (let t = first; t <= last; t += 1) if (t !== without) others.push(this.#name(t));
    const more = others.length - MOST_NAMED;
    return more > 0 ? `${others.slice(0, MOST_NAMED).join(", ")} and ${more} more` : others.join(", ");
  }

  #name(token) {
    return `“${visible(this.#trace.tokens[token]).trimEnd() || " "}”`;
  }

  #pressed(event) {
    const at = this.#current ?? 0;
    const last = this.#spans.length - 1;
    const next = {
      ArrowLeft: () => at - 1,
      ArrowRight: () => at + 1,
      ArrowUp: () => this.#inLine(at, -1),
      ArrowDown: () => this.#inLine(at, 1),
      Home: () => 0,
      End: () => last,
    }[event.key]?.();
    if (next === undefined) return;
    event.preventDefault();
    this.#pointed = null;
    this.#goTo(Math.min(Math.max(next, 0), last));
  }

  /** The token of the line above or below that is nearest to a token's left edge. */
  #inLine(from, way) {
    const start = this.#spans[from];
    let best = from;
    let line = null;
    for (let t = from + way; t >= 0 && t < this.#spans.length; t += way) {
      const { offsetTop, offsetLeft } = this.#spans[t];
      if (Math.abs(offsetTop - start.offsetTop) < 4) continue;
      if (line !== null && Math.abs(offsetTop - line) >= 4) break;
      line = offsetTop;
      const far = (left) => Math.abs(left - start.offsetLeft);
      if (best === from || far(offsetLeft) < far(this.#spans[best].offsetLeft)) best = t;
    }
    return best;
  }
}

function tokenOf(target) {
  const { token } = target.dataset;
  return token === undefined ? null : Number(token);
}

/** A token's text with its line ends seen, and a place to point at where it has no text. */
function visible(text) {
  return text === "" ? "·" : text.replaceAll("\n", "↵\n");
}
