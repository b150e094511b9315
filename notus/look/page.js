// The page of `python -m notus.look`. Its data: {source, rule, of, chosen, counts, sort, rows};
// a row is a record of notus/look/record.py. Every text of a row enters the page as a text node.
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

// ------------------------------------------------------------------------------ differences

const MOST_CELLS = 6e6;

/** For two lists of words, for each word whether the other has it too (longest common
 *  subsequence); null if they are too long to compare. */
function common(a, b) {
  const flags = [new Array(a.length).fill(true), new Array(b.length).fill(true)];
  let start = 0, m = a.length, n = b.length;
  while (start < m && start < n && a[start] === b[start]) start++;
  while (m > start && n > start && a[m - 1] === b[n - 1]) m--, n--;
  const rows = m - start, columns = n - start, width = columns + 1;
  if (rows * columns > MOST_CELLS) return null;
  const best = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--)
    for (let j = columns - 1; j >= 0; j--)
      best[i * width + j] = a[start + i] === b[start + j] ? best[(i + 1) * width + j + 1] + 1
        : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && a[start + i] === b[start + j]) i++, j++;
    else if (j === columns || (i < rows && best[(i + 1) * width + j] >= best[i * width + j + 1]))
      flags[0][start + i++] = false;
    else flags[1][start + j++] = false;
  }
  return flags;
}

const words = (text) => text.match(/\s*\S+|\s+$/g) || [];

/** A text as nodes; runs of words that the other text lacks are in <mark> elements. */
function marked(parts, flags) {
  const nodes = [];
  for (let i = 0; i < parts.length; ) {
    let end = i;
    while (end < parts.length && flags[end] === flags[i]) end++;
    const run = texts(parts.slice(i, end).join(""));
    nodes.push(...(flags[i] ? run : [el("mark", {}, ...run)]));
    i = end;
  }
  return nodes;
}

// ------------------------------------------------------------------------------------ state

let data, rows, order = [], current = null, changed = false;
const searched = [];
const marks = new Map(); // row number -> {mark, note}
const ranges = new Map(); // number's name -> [low, high]
const drawings = new Map(); // number's name -> what redraws its histogram
let ascending = true;

const outcome = (row) => row.dropped ?? (row.unusable ? `trainer: ${row.unusable}` : "pair");
const number = (row, name) => row.numbers[name];

function textOf(i) {
  return (searched[i] ??= JSON.stringify([rows[i].turns, rows[i].responses, rows[i].where])
    .toLocaleLowerCase());
}

function passes(i) {
  const row = rows[i], mark = marks.get(i), wanted = $("marked").value;
  return (!$("source").value || row.source === $("source").value)
    && (!$("outcome").value || outcome(row) === $("outcome").value)
    && (!$("flag").value || row.flags.includes($("flag").value))
    && (!wanted || (wanted === "any" ? mark : wanted === "none" ? !mark : mark?.mark === wanted))
    && [...ranges].every(([name, [low, high]]) => number(row, name) >= low && number(row, name) <= high)
    && (!$("text").value || textOf(i).includes(JSON.stringify($("text").value).slice(1, -1).toLocaleLowerCase()));
}

/** Filters and sorts the rows and redraws the list; rows without the number come last. */
function update() {
  const name = $("sort").value, sign = ascending ? 1 : -1;
  order = rows.map((_, i) => i).filter(passes);
  if (name) order.sort((a, b) => {
    const x = number(rows[a], name), y = number(rows[b], name);
    return x === undefined || y === undefined ? (x === undefined) - (y === undefined) || a - b
      : sign * (x - y) || a - b;
  });
  else if (!ascending) order.reverse();
  $("direction").textContent = ascending ? "Lowest first" : "Highest first";
  $("shown").textContent = `${order.length.toLocaleString("en")} of ${counted(rows.length, "row")} shown`;
  if ($("numbers").open) for (const draw of drawings.values()) draw();
  if (!order.includes(current)) show(order[0] ?? null);
  else reveal(), showMark();
}

// ----------------------------------------------------------------- the list, drawn where it is seen

const HEIGHT = 32; // of an item, in pixels; also in page.css
const MARGIN = 20; // items that are drawn above and below those seen

function item(i) {
  const row = rows[i], value = number(row, $("sort").value);
  const asked = row.turns.length ? row.turns[row.turns.length - 1][1] : "";
  const head = asked.slice(0, 1000).replace(/\s+/g, " ").trim().slice(0, 160) || row.where || outcome(row);
  const button = el("button", { type: "button", ...(i === current ? { "aria-current": "true" } : {}) },
    el("span", { class: "head", dir: "auto" }, ...texts(head)),
    el("span", { class: "badge" }, marks.has(i) ? marks.get(i).mark ?? "note" : ""),
    el("span", { class: "value" }, value === undefined ? "" : fixed(value)));
  button.addEventListener("click", () => show(i));
  const place = { "aria-setsize": order.length, "aria-posinset": order.indexOf(i) + 1 };
  return el("li", { ...place, ...(outcome(row) === "pair" ? {} : { class: "out" }) }, button);
}

function drawList() {
  const list = $("list"), seen = Math.ceil(list.clientHeight / HEIGHT);
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - MARGIN);
  const drawn = order.slice(first, first + seen + 2 * MARGIN);
  const focused = list.contains(document.activeElement);
  $("items").style.paddingTop = `${first * HEIGHT}px`;
  $("items").style.height = `${order.length * HEIGHT}px`;
  $("items").replaceChildren(...drawn.map(item));
  if (focused) $("items").querySelector("[aria-current]")?.focus({ preventScroll: true });
}

/** Draws the list with the shown row in it. */
function reveal() {
  const list = $("list"), top = order.indexOf(current) * HEIGHT;
  $("items").style.height = `${order.length * HEIGHT}px`;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
  drawList();
}

// ------------------------------------------------------------------------------------ a row

function folded(title, ...children) {
  return el("details", {}, el("summary", {}, title), ...children);
}

const prose = (text, extra = "") => el("div", { class: `prose ${extra}`, dir: "auto" }, ...texts(text));

function ratings(response) {
  const lines = response.ratings?.map(([aspect, rating, rationale]) => {
    const head = [el("b", {}, ...texts(aspect)), " ", ...texts(rating)];
    return rationale ? el("details", {}, el("summary", {}, ...head), prose(rationale)) : el("div", {}, ...head);
  }) ?? [];
  if (response.critique) lines.push(folded("Critique", prose(response.critique)));
  return lines.length ? el("div", { class: "ratings" }, ...lines) : null;
}

function response(row, place, body) {
  const found = row.responses[place];
  const side = place === row.chosen ? "chosen" : place === row.rejected ? "rejected" : "other";
  const facts = ["mean rating", "overall score", "rating"].filter((name) => name in found)
    .map((name) => `${name} ${fixed(found[name])}`);
  const title = side === "other" ? `response ${place + 1}` : side;
  return el("section", { class: side, "aria-label": title },
    el("h3", {}, title, found.model ? el("small", {}, ...texts(` ${found.model}`)) : ""),
    el("p", { class: "facts" }, [...facts, counted([...found.text].length, "character")].join(", ")),
    found.picks ? el("p", { class: "picks" }, ...found.picks.map((pick) => el("span", {}, pick))) : "",
    el("div", { class: "prose", dir: "auto" }, ...body), ratings(found));
}

/** Shows row i; null for none. */
function show(i) {
  current = i;
  reveal();
  $("row").replaceChildren();
  $("link").textContent = "";
  showMark();
  if (i === null) return void $("row").append(el("p", {}, "No row passes the filters."));
  const row = rows[i];
  $("link").textContent = row.where || `row ${i + 1}`;
  $("link").href = `#row=${encodeURIComponent(row.where || i)}`;
  history.replaceState(null, "", $("link").href);
  const last = row.turns.length - 1, pair = row.chosen !== null;
  const turn = ([role, text]) => el("section", { class: "turn", "aria-label": role }, el("h3", {}, role), prose(text));
  const tags = [outcome(row) === "pair" ? "" : `dropped: ${outcome(row)}`, ...row.flags, row.source ?? ""];
  $("row").append(el("p", { class: "tags" }, ...tags.filter(Boolean).map((tag) => el("span", {}, ...texts(tag)))));
  if (last > 0) $("row").append(folded(`${counted(last, "earlier message")}: ${row.turns.slice(0, last)
    .map(([role]) => role).join(", ")}`, ...row.turns.slice(0, last).map(turn)));
  if (last >= 0) $("row").append(turn(row.turns[last]));
  const both = pair ? [row.chosen, row.rejected] : [];
  let bodies = both.map((place) => texts(row.responses[place].text));
  if (pair) {
    const long = both.some((place) => row.responses[place].text.length > MOST_SHOWN);
    const [a, b] = both.map((place) => long ? [] : words(row.responses[place].text));
    const flags = long ? null : common(a.map((w) => w.trim()), b.map((w) => w.trim()));
    if (flags) bodies = [marked(a, flags[0]), marked(b, flags[1])];
    else $("row").append(el("p", { class: "hint" }, "Too long to compare word by word."));
  }
  const others = row.responses.map((_, place) => place).filter((place) => !both.includes(place));
  $("row").append(el("div", { class: "responses" },
    ...both.map((place, k) => response(row, place, bodies[k])),
    ...others.map((place) => response(row, place, texts(row.responses[place].text)))));
  for (const [rule, reason] of Object.entries(row.rules ?? {}))
    $("row").append(el("p", { class: "hint" }, ...texts(`${rule}: no pair (${reason})`)));
  const numbers = Object.entries(row.numbers);
  if (numbers.length) $("row").append(folded("Numbers", el("table", {}, ...numbers.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, fixed(value)))))));
}

function step(by) {
  const place = order.indexOf(current) + by;
  if (order[place] !== undefined) show(order[place]);
}

/** Shows the row that the address names. */
function follow() {
  const named = decodeURIComponent(location.hash.replace(/^#row=/, ""));
  const i = rows.findIndex((row, n) => (row.where || String(n)) === named);
  if (i < 0 || i === current) return i >= 0;
  if (!order.includes(i)) reset();
  show(i);
  return true;
}

// ------------------------------------------------------------------------------------ marks

function showMark() {
  const mark = marks.get(current);
  for (const button of document.querySelectorAll("[data-mark]")) {
    button.setAttribute("aria-pressed", String(mark?.mark === button.dataset.mark));
    button.disabled = current === null || !fits(current, button.dataset.mark);
  }
  $("note").disabled = $("all").disabled = current === null;
  $("all").textContent = `Mark all ${order.length.toLocaleString("en")} shown the same`;
  if (document.activeElement !== $("note")) $("note").value = mark?.note ?? "";
  $("save").textContent = `Save ${counted(marks.size, "mark")}`;
}

const fits = (i, name) => name !== "swap" || rows[i].key.responses.length === 2;

/** Changes the marks of rows; a row without mark and note has none. */
function mark(change, places = [current]) {
  for (const i of places.filter((i) => i !== null && fits(i, change.mark))) {
    const now = { mark: null, note: "", ...marks.get(i), ...change };
    if (now.mark || now.note) marks.set(i, now);
    else marks.delete(i);
  }
  changed = true;
  $("saved").textContent = "";
  drawList();
  showMark();
}

function toggle(name) {
  const button = document.querySelector(`[data-mark=${name}]`);
  if (!button.disabled) mark({ mark: marks.get(current)?.mark === name ? null : name });
}

/** Saves all marks as JSON lines, for "marks" in a source's curation. */
function save() {
  const lines = [...marks.keys()].sort((a, b) => a - b).map((i) =>
    `${JSON.stringify({ ...rows[i].key, ...marks.get(i), where: rows[i].where })}\n`);
  const url = URL.createObjectURL(new Blob(lines, { type: "application/x-ndjson" }));
  el("a", { href: url, download: "marks.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  changed = false;
  $("saved").textContent = `${counted(lines.length, "mark")} saved as marks.jsonl`;
}

// ------------------------------------------------------------------------------- histograms

const BINS = 40;

function histogram(name) {
  const values = rows.map((row) => number(row, name)).filter((x) => x !== undefined);
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const span = high - low || 1;
  const bars = (found, most) => {
    const counts = new Array(BINS).fill(0);
    for (const x of found) counts[Math.min(BINS - 1, Math.floor((x - low) / span * BINS))]++;
    const top = Math.sqrt(most ?? Math.max(...counts));
    const path = counts.map((n, k) => n ? `M${k} 1V${1 - Math.sqrt(n) / top}H${k + 0.9}V1Z` : "").join("");
    return [path, Math.max(...counts)];
  };
  const svgEl = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const [path, most] = bars(values);
  const svg = svgEl("svg", { viewBox: `0 0 ${BINS} 1`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const brush = svgEl("rect", { class: "brush", y: 0, height: 1, width: 0 });
  const shown = svgEl("path", { class: "shown", d: path });
  svg.append(svgEl("path", { d: path }), shown, brush);
  const inputs = ["from", "to"].map((word, k) =>
    el("input", { type: "number", step: "any", "aria-label": `${name}, ${word}`, placeholder: fixed([low, high][k]) }));
  const set = (range) => {
    if (range) ranges.set(name, range);
    else ranges.delete(name);
    update();
  };
  const typed = () => {
    const [from, to] = inputs.map((input) => input.value === "" ? undefined : Number(input.value));
    set(from === undefined && to === undefined ? null : [from ?? -Infinity, to ?? Infinity]);
  };
  for (const input of inputs) input.addEventListener("change", typed);
  let anchor = null;
  const valueAt = (event) => {
    const box = svg.getBoundingClientRect();
    return low + span * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  };
  svg.addEventListener("pointerdown", (event) => {
    anchor = valueAt(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (anchor !== null) drawBrush([anchor, valueAt(event)].sort((a, b) => a - b));
  });
  svg.addEventListener("pointerup", (event) => {
    const range = [anchor, valueAt(event)].sort((a, b) => a - b);
    anchor = null;
    set(range[1] - range[0] > span / 200 ? range : null); // a click lifts the filter
  });
  const drawBrush = (range) => {
    const [from, to] = (range ?? [low, low]).map((x) => (Math.min(high, Math.max(low, x)) - low) / span * BINS);
    brush.setAttribute("x", from);
    brush.setAttribute("width", to - from);
  };
  drawings.set(name, () => {
    const range = ranges.get(name);
    const found = order.map((i) => number(rows[i], name)).filter((x) => x !== undefined);
    shown.setAttribute("d", bars(found, most)[0]);
    drawBrush(range);
    inputs.forEach((input, k) => (input.value = range && Number.isFinite(range[k]) ? fixed(range[k]) : ""));
  });
  return el("fieldset", {}, el("legend", {}, name), svg, ...inputs);
}

// ------------------------------------------------------------------------------------ start

function options(id, all, found) {
  const counts = new Map();
  for (const value of found) counts.set(value, (counts.get(value) ?? 0) + 1);
  const shown = [...counts].sort((a, b) => b[1] - a[1]);
  $(id).replaceChildren(el("option", { value: "" }, all),
    ...shown.map(([value, n]) => el("option", { value }, ...texts(`${value} (${n})`))));
  $(id).parentElement.hidden = shown.length < (id === "flag" ? 1 : 2);
}

function reset() {
  for (const id of ["text", "source", "outcome", "flag", "marked"]) $(id).value = "";
  ranges.clear();
  for (const draw of drawings.values()) draw();
  update();
}

function start(found) {
  data = found;
  rows = data.rows;
  $("held").textContent = `${rows.length.toLocaleString("en")} of ${counted(data.of, "row")}: ${data.chosen}.`
    + (data.rule ? ` Pairs by the rule "${data.rule}".` : "");
  const { rows: all, pairs, dropped, ...others } = data.counts;
  const table = [["rows", all], ["pairs", pairs], ...Object.entries(dropped).map(([k, n]) => [`dropped: ${k}`, n]),
    ...Object.entries(others["pairs that the trainer drops"]).map(([k, n]) => [`pairs that the trainer drops: ${k}`, n])];
  $("counts").append(...table.map(([name, n]) => el("tr", {}, el("th", { scope: "row" }, ...texts(name)),
    el("td", {}, n.toLocaleString("en")))));
  rows.forEach((row, i) => {
    if (row.mark) marks.set(i, row.mark);
  });
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.numbers)))];
  options("source", "all", rows.map((row) => row.source).filter((source) => source !== null));
  options("outcome", "all", rows.map(outcome));
  options("flag", "any row", rows.flatMap((row) => row.flags));
  $("marked").replaceChildren(...[["", "any row"], ["any", "marked"], ["none", "not marked"], ["keep", "keep"],
    ["drop", "drop"], ["swap", "swap"]].map(([value, text]) => el("option", { value }, text)));
  $("sort").replaceChildren(el("option", { value: "" }, "order of the file"),
    ...names.map((name) => el("option", { value: name }, name)));
  if (data.sort) $("sort").value = data.sort;
  for (const id of ["source", "outcome", "flag", "marked", "sort"]) $(id).addEventListener("change", update);
  let waiting;
  $("text").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 150);
  });
  $("direction").addEventListener("click", () => { ascending = !ascending; update(); });
  $("reset").addEventListener("click", reset);
  $("numbers").addEventListener("toggle", () => {
    if (!drawings.size) $("histograms").append(...names.map(histogram));
    for (const draw of drawings.values()) draw();
  });
  $("numbers").hidden = !names.length;
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  for (const button of document.querySelectorAll("[data-mark]"))
    button.addEventListener("click", () => toggle(button.dataset.mark));
  $("note").addEventListener("input", () => mark({ note: $("note").value }));
  $("all").addEventListener("click", () => mark({ mark: marks.get(current)?.mark ?? null }, order));
  $("save").addEventListener("click", save);
  const keys = { ArrowLeft: () => step(-1), p: () => step(-1), ArrowRight: () => step(1), n: () => step(1),
    k: () => toggle("keep"), d: () => toggle("drop"), s: () => toggle("swap"), m: () => $("note").focus() };
  addEventListener("keydown", (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  $("note").addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") $("note").blur();
  });
  $("list").addEventListener("scroll", () => requestAnimationFrame(drawList));
  addEventListener("resize", drawList);
  addEventListener("hashchange", follow);
  addEventListener("beforeunload", (event) => { if (changed) event.preventDefault(); });
  const linked = location.hash;
  update();
  if (linked) history.replaceState(null, "", linked), follow();
  document.body.dataset.ready = "true";
}

const packed = Uint8Array.from(atob($("data").textContent), (c) => c.charCodeAt(0));
new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json().then(start);
