// Two lines over time, drawn by hand: tokens seen, and slots held on average. One unit of the drawing is one pixel.

import { count, mean } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 148;
const EDGE = { top: 10, right: 92, bottom: 20, left: 38 };
/** Labels at the ends of the lines are kept so far apart. */
const APART = 15;
const MOST_POINTS = 400;

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Round numbers from 0 to `most`, about `wanted` of them. */
function ticks(most, wanted) {
  const rough = most / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
}

/** Every so manieth point, and always the last. */
function thinned(points) {
  const every = Math.ceil(points.length / MOST_POINTS);
  return points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

export class Chart {
  #place;
  #points = [];

  constructor(place) {
    this.#place = place;
    new ResizeObserver(() => this.draw(this.#points)).observe(place);
  }

  draw(points) {
    this.#points = points;
    const width = this.#place.clientWidth;
    if (width === 0) return;
    const svg = shape("svg", { width, height: HEIGHT, role: "img", "aria-label": this.#summary() });
    const newest = points.at(-1);
    const time = { most: Math.max(newest?.time ?? 0, 1), from: EDGE.left, to: width - EDGE.right };
    const amount = { most: Math.max(newest?.tokens ?? 0, 10) * 1.05, from: HEIGHT - EDGE.bottom, to: EDGE.top };
    const place = (axis, value) => axis.from + (value / axis.most) * (axis.to - axis.from);

    for (const value of ticks(amount.most, 4)) {
      const y = Math.round(place(amount, value)) + 0.5;
      svg.append(shape("line", { class: value === 0 ? "axis" : "rule", x1: time.from, x2: time.to, y1: y, y2: y }));
      svg.append(shape("text", { class: "tick", x: time.from - 6, y: y + 3.5, "text-anchor": "end" }, count(value)));
    }
    for (const value of ticks(time.most, width < 400 ? 3 : 5)) {
      const x = place(time, value);
      svg.append(shape("text", { class: "tick", x, y: HEIGHT - 5, "text-anchor": "middle" }, `${+value.toFixed(3)} s`));
    }
    if (newest) {
      const line = (name) =>
        thinned(points).map((p) => `${place(time, p.time).toFixed(1)},${place(amount, p[name]).toFixed(1)}`).join(" ");
      svg.append(shape("polyline", { class: "line tokens-line", points: line("tokens") }));
      svg.append(shape("polyline", { class: "line slots-line", points: line("slots") }));
      this.#label(svg, place(time, newest.time), place(amount, newest.tokens), place(amount, newest.slots));
    }
    this.#place.replaceChildren(svg);
  }

  #label(svg, x, tokensAt, slotsAt) {
    const { tokens, slots } = this.#points.at(-1);
    const below = Math.min(Math.max(slotsAt, tokensAt + APART), HEIGHT - EDGE.bottom);
    const above = Math.min(tokensAt, below - APART);
    svg.append(shape("text", { class: "end tokens-end", x: x + 6, y: above + 4 }, `${count(tokens)} tokens`));
    svg.append(shape("text", { class: "end slots-end", x: x + 6, y: below + 4 }, `${mean(slots)} slots`));
  }

  #summary() {
    const newest = this.#points.at(-1);
    if (!newest) return "Tokens seen and slots held over time: nothing yet";
    return (
      `After ${newest.time.toFixed(1)} seconds: ${count(newest.tokens)} tokens seen, ` +
      `${mean(newest.slots)} slots held on average`
    );
  }
}
