// Elements of the page. Every text of a row enters it as a text node.
"use strict";

const $ = (id) => document.getElementById(id);

/** An element with attributes, and children that are elements or texts (never markup). */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

const fixed = (x) => (Number.isInteger(x) ? String(x) : String(+x.toFixed(3)));
const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

// Characters that hide or reorder text are shown by their number: controls, bidirectional
// overrides, spaces without width. The joiners of emoji and of Persian remain.
const HIDDEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff])/;

// A browser takes minutes to lay out a text of millions of characters, so the rest is only counted.
const MOST_SHOWN = 2e5;

function texts(text) {
  const nodes = text.slice(0, MOST_SHOWN).split(HIDDEN).map((part, i) => {
    const code = i % 2 && `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    return code ? el("span", { class: "hidden", title: "a character that is not visible" }, code) : part;
  });
  const left = text.length - MOST_SHOWN;
  return left > 0 ? [...nodes, el("span", { class: "hidden" }, counted(left, "more character"))] : nodes;
}

/** A table of names and values, which are texts. */
function table(lines) {
  return el("table", {}, ...lines.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, ...texts(name)), el("td", {}, value))));
}
