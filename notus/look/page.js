// The page of `python -m notus.look`: filters, the list, marks. Its data: {source, rule, of, chosen,
// counts, sort, rows}; a row is a record of notus/look/record.py.

// ------------------------------------------------------------------------------------ state

let rows, order = [], current = null, ascending = true, changed = false;
const searched = [];
const marks = new Map(); // row number -> {mark, note}
const ranges = new Map(); // number's name -> [low, high]
const drawings = []; // what redraws each histogram

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
    && [...ranges].every(([name, [low, high]]) => row.numbers[name] >= low && row.numbers[name] <= high)
    && (!$("text").value || textOf(i).includes(JSON.stringify($("text").value).slice(1, -1).toLocaleLowerCase()));
}

/** Filters and sorts the rows and redraws the list; rows without the number come last. */
function update() {
  const name = $("sort").value, sign = ascending ? 1 : -1;
  order = rows.map((_, i) => i).filter(passes);
  if (name) order.sort((a, b) => {
    const x = rows[a].numbers[name], y = rows[b].numbers[name];
    return x === undefined || y === undefined ? (x === undefined) - (y === undefined) || a - b
      : sign * (x - y) || a - b;
  });
  else if (!ascending) order.reverse();
  $("direction").textContent = ascending ? "Lowest first" : "Highest first";
  $("shown").textContent = `${order.length.toLocaleString("en")} of ${counted(rows.length, "row")} shown`;
  drawHistograms();
  if (!order.includes(current)) show(order[0] ?? null);
  else reveal(), showMark(); // what is unfolded in the row remains so
}

// ----------------------------------------------------------------- the list, drawn where it is seen

const HEIGHT = 32; // of an item, in pixels; also in page.css
const AROUND = 20; // items that are drawn above and below those seen

/** A row in the list: the start of its last turn, its mark, and the number sorted by. */
function item(i) {
  const row = rows[i], value = row.numbers[$("sort").value];
  const asked = row.turns.at(-1)?.[1] ?? "";
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
  const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - AROUND);
  const focused = list.contains(document.activeElement);
  $("items").style.paddingTop = `${first * HEIGHT}px`;
  $("items").style.height = `${order.length * HEIGHT}px`;
  $("items").replaceChildren(...order.slice(first, first + seen + 2 * AROUND).map(item));
  if (focused) $("items").querySelector("[aria-current]")?.focus({ preventScroll: true });
}

/** Draws the list with the shown row in it; scrolls the list, not the page. */
function reveal() {
  const list = $("list"), top = order.indexOf(current) * HEIGHT;
  $("items").style.height = `${order.length * HEIGHT}px`;
  list.scrollTop = Math.max(top + HEIGHT - list.clientHeight, Math.min(top, list.scrollTop));
  drawList();
}

// ------------------------------------------------------------------------------------ a row

/** Shows row i; null for none. */
function show(i) {
  current = i;
  reveal();
  showMark();
  const row = rows[i];
  $("row").replaceChildren(...(row ? describe(row) : [el("p", {}, "No row passes the filters.")]));
  $("link").textContent = row ? row.where || `row ${i + 1}` : "";
  if (!row) return;
  $("link").href = `#row=${encodeURIComponent(row.where || i)}`;
  history.replaceState(null, "", $("link").href);
}

function step(by) {
  const place = order.indexOf(current) + by;
  if (order[place] !== undefined) show(order[place]);
}

/** Shows the row that the address names. */
function follow() {
  const named = decodeURIComponent(location.hash.replace(/^#row=/, ""));
  const i = rows.findIndex((row, n) => (row.where || String(n)) === named);
  if (i < 0 || i === current) return;
  if (!order.includes(i)) reset();
  show(i);
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
  update();
}

function start(data) {
  rows = data.rows;
  $("held").textContent = `${rows.length.toLocaleString("en")} of ${counted(data.of, "row")}: ${data.chosen}.`
    + (data.rule ? ` Pairs by the rule "${data.rule}".` : "");
  const counts = Object.entries(data.counts).flatMap(([name, found]) => typeof found === "number" ? [[name, found]]
    : Object.entries(found).map(([reason, n]) => [`${name}: ${reason}`, n]));
  $("counts").append(table(counts.map(([name, n]) => [name, n.toLocaleString("en")])));
  rows.forEach((row, i) => {
    if (row.mark) marks.set(i, row.mark);
  });
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.numbers)))];
  options("source", "all", rows.map((row) => row.source).filter((source) => source !== null));
  options("outcome", "all", rows.map(outcome));
  options("flag", "any row", rows.flatMap((row) => row.flags));
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
    if (!drawings.length) $("histograms").append(...names.map(histogram));
    drawHistograms();
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
