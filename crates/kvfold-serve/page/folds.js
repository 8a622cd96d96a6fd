// What a trace says: which tokens share a slot, per layer and KV head. No part of this touches the document.

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

export class Trace {
  #bits;

  constructor({ delay, method, tokens, folds }) {
    this.delay = delay;
    /** "dmc", "dms", or null where nothing is compressed. */
    this.method = method;
    this.tokens = tokens;
    this.layers = folds.length;
    this.heads = folds[0]?.length ?? 0;
    this.#bits = folds.map((layer) => layer.map(bytesOf));
  }

  get evicts() {
    return this.method === "dms";
  }

  /** Whether a token shares the slot of the token before it, by folding or by taking it. */
  joined(layer, head, token) {
    return ((this.#bits[layer][head][token >> 3] ?? 0) >> (token & 7)) % 2 === 1;
  }

  /** Whether a token has no pair of its own: folded into an older one, or evicted. */
  gone(layer, head, token) {
    return this.joined(layer, head, this.evicts ? token + 1 : token);
  }

  /** Whether the decision that concerns a token is still to come. An eviction is decided by the token after it. */
  undecided(token) {
    return (this.evicts ? token + 1 : token) >= this.tokens.length - this.delay;
  }

  /** The first and the last token of the slot that a token is, or was, in. */
  slotOf(layer, head, token) {
    let first = token;
    let last = token;
    while (first > 0 && this.joined(layer, head, first)) first -= 1;
    while (last + 1 < this.tokens.length && this.joined(layer, head, last + 1)) last += 1;
    return { first, last };
  }

  /** Every slot of a head, in order. */
  *slots(layer, head) {
    for (let token = 0; token < this.tokens.length; ) {
      const slot = this.slotOf(layer, head, token);
      yield slot;
      token = slot.last + 1;
    }
  }

  /** How many heads have no pair of a token's own. */
  goneIn(token) {
    let heads = 0;
    for (let layer = 0; layer < this.layers; layer += 1) {
      for (let head = 0; head < this.heads; head += 1) {
        if (this.gone(layer, head, token)) heads += 1;
      }
    }
    return heads;
  }
}

/**
 * Where two texts first differ, in UTF-16 units, never inside a character. Null while they do not: one that is a prefix
 * of the other differs only when both have ended.
 */
export function firstDifference(one, other, ended) {
  const shorter = Math.min(one.length, other.length);
  let at = 0;
  while (at < shorter && one[at] === other[at]) at += 1;
  if (at === shorter && (!ended || one.length === other.length)) return null;
  const insidePair = at > 0 && /[\uD800-\uDBFF]/.test(one[at - 1]);
  return insidePair ? at - 1 : at;
}

/** The word that holds place `at` of a text: `[start, end)`. Both are the text's end where the text ends at `at`. */
export function wordAt(text, at) {
  if (at >= text.length) return [text.length, text.length];
  const start = at - /\S*$/.exec(text.slice(0, at))[0].length;
  const end = at + /^(\s+|\S*)/.exec(text.slice(at))[0].length;
  return [start, end];
}
