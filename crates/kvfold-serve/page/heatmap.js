// Layers by KV heads: how many of the tokens seen still have a slot. A grid with one stop for Tab, and arrows within it.

import { byId, element } from "./dom.js";
import { headName, mean, count, percent } from "./format.js";

/** Up to so many layers, cells are wide enough for their number. */
const NUMBERED = 12;
/** From this share on, a cell's ground is nearer to the end of the scale, and its number has the other colour. */
const STRONG = 0.58;

export class HeatMap extends EventTarget {
  #place = byId("heat");
  #readout = byId("heat-readout");
  #blank = this.#place.firstElementChild;
  /** [layer][head] */
  #cells = [];
  #slots = null;
  #seen = 0;
  #chosen = null;
  #current = { layer: 0, head: 0 };
  #pointed = null;

  constructor() {
    super();
    this.#place.addEventListener("click", (event) => this.#clicked(event));
    this.#place.addEventListener("keydown", (event) => this.#pressed(event));
    this.#place.addEventListener("pointerover", (event) => this.#point(headOf(event.target)));
    this.#place.addEventListener("pointerleave", () => this.#point(null));
  }

  get chosen() {
    return this.#chosen;
  }

  /** Chooses a head, or all of them with null, and tells who listens. */
  choose(head) {
    this.#mark(this.#chosen, false);
    this.#chosen = head;
    this.#mark(head, true);
    if (head) this.#stopAt(head);
    this.#read();
    this.dispatchEvent(new Event("choose"));
  }

  /** Shows slots, [layer][head], of `seen` tokens. With null the grid stays, and is empty. */
  draw(slots, seen) {
    this.#slots = slots ?? this.#cells.map((column) => column.map(() => 0));
    this.#seen = slots ? seen : 0;
    const layers = this.#slots.length;
    const heads = this.#slots[0]?.length ?? 0;
    if (layers !== this.#cells.length || heads !== (this.#cells[0]?.length ?? 0)) this.#build(layers, heads);
    this.#cells.forEach((column, layer) => column.forEach((cell, head) => this.#paint(cell, { layer, head })));
    this.#read();
  }

  /** Takes the grid away. */
  clear() {
    this.#cells = [];
    this.#place.replaceChildren(this.#blank);
    this.choose(null);
  }

  /** Dots the heads for which `wanted(layer, head)` holds. */
  dot(wanted) {
    this.#cells.forEach((column, layer) =>
      column.forEach((cell, head) => cell.classList.toggle("dot", wanted(layer, head))),
    );
  }

  #build(layers, heads) {
    this.#cells = Array.from({ length: layers }, () => []);
    const numbered = layers <= NUMBERED;
    const every = numbered ? 1 : Math.ceil(layers / 8);
    const table = element("table", { className: numbered ? "heat numbered" : "heat" });
    table.setAttribute("role", "grid");
    table.setAttribute("aria-labelledby", "heat-title");
    const top = element("tr", {}, element("th", { scope: "col", className: "corner" }, "head \\ layer"));
    for (let layer = 0; layer < layers; layer += 1) {
      const label = element("span", { className: layer % every ? "unseen" : "" }, `${layer}`);
      top.append(element("th", { scope: "col" }, label));
    }
    const rows = Array.from({ length: heads }, (_, head) => {
      const row = element("tr", {}, element("th", { scope: "row" }, `${head}`));
      for (let layer = 0; layer < layers; layer += 1) {
        const cell = element("td", { tabIndex: -1, data: { testid: "heat-cell", layer, head } });
        this.#cells[layer].push(cell);
        row.append(cell);
      }
      return row;
    });
    table.append(element("thead", {}, top), element("tbody", {}, ...rows));
    this.#place.replaceChildren(table);
    const fits = this.#chosen && this.#chosen.layer < layers && this.#chosen.head < heads;
    this.#stopAt({ layer: 0, head: 0 });
    this.choose(fits ? this.#chosen : null);
  }

  /** A cell's ground is to the percent, so that few cells change with a token once there are many. */
  #paint(cell, { layer, head }) {
    cell.setAttribute("aria-label", this.#describe({ layer, head }));
    const share = this.#share({ layer, head });
    const shown = this.#seen > 0 ? `${Math.round(share * 100)}` : "";
    if (cell.dataset.percent === shown) return;
    cell.dataset.percent = shown;
    cell.style.setProperty("--share", `${Math.min(Number(shown), 100)}%`);
    cell.classList.toggle("strong", share > STRONG);
    if (this.#cells.length <= NUMBERED) cell.textContent = shown;
  }

  #share({ layer, head }) {
    return this.#seen > 0 ? this.#slots[layer][head] / this.#seen : 0;
  }

  #describe(head) {
    if (this.#seen === 0) return `${headName(head)}: nothing yet`;
    const slots = this.#slots[head.layer][head.head];
    const held = Number.isInteger(slots) ? count(slots) : mean(slots);
    return `${headName(head)}: ${held} of ${count(this.#seen)} (${percent(this.#share(head))})`;
  }

  /** The line below: the head pointed at, or the one chosen, or the range of all. */
  #read() {
    const head = this.#pointed ?? this.#chosen;
    if (this.#cells.length === 0 || this.#seen === 0) {
      this.#readout.textContent = "";
    } else if (head) {
      this.#readout.textContent = this.#describe(head);
    } else {
      this.#readout.textContent = this.#range();
    }
  }

  #range() {
    let low = { layer: 0, head: 0 };
    let high = low;
    this.#cells.forEach((column, layer) =>
      column.forEach((_, head) => {
        if (this.#share({ layer, head }) < this.#share(low)) low = { layer, head };
        if (this.#share({ layer, head }) > this.#share(high)) high = { layer, head };
      }),
    );
    if (this.#share(low) === this.#share(high)) return `${percent(this.#share(low))} in every head`;
    return `${percent(this.#share(low))} (${headName(low)}) to ${percent(this.#share(high))} (${headName(high)})`;
  }

  #point(head) {
    this.#pointed = head;
    this.#read();
  }

  #mark(head, on) {
    const cell = head && this.#cells[head.layer]?.[head.head];
    if (!cell) return;
    cell.classList.toggle("chosen", on);
    cell.setAttribute("aria-selected", `${on}`);
  }

  #stopAt(head) {
    const cell = ({ layer, head: row }) => this.#cells[layer]?.[row];
    if (cell(this.#current)) cell(this.#current).tabIndex = -1;
    this.#current = head;
    if (cell(head)) cell(head).tabIndex = 0;
  }

  #clicked(event) {
    const head = headOf(event.target);
    if (!head) return;
    const again = this.#chosen && head.layer === this.#chosen.layer && head.head === this.#chosen.head;
    this.choose(again ? null : head);
  }

  #pressed(event) {
    const { layer, head } = this.#current;
    const lastLayer = this.#cells.length - 1;
    const lastHead = (this.#cells[0]?.length ?? 0) - 1;
    const next = {
      ArrowLeft: { layer: layer - 1, head },
      ArrowRight: { layer: layer + 1, head },
      ArrowUp: { layer, head: head - 1 },
      ArrowDown: { layer, head: head + 1 },
      Home: { layer: 0, head },
      End: { layer: lastLayer, head },
      Enter: { layer, head },
      " ": { layer, head },
    }[event.key];
    if (!next) return;
    event.preventDefault();
    if (next.layer < 0 || next.layer > lastLayer || next.head < 0 || next.head > lastHead) return;
    this.#pointed = null;
    this.choose(next);
    this.#cells[next.layer][next.head].focus();
  }
}

function headOf(target) {
  const { layer, head } = target.closest("td")?.dataset ?? {};
  return layer === undefined ? null : { layer: Number(layer), head: Number(head) };
}
