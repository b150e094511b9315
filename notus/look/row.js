// A row as elements of the page.

/** Why the row is no pair that is trained on, or "pair". */
const outcome = (row) => row.dropped ?? (row.unusable ? `trainer: ${row.unusable}` : "pair");

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

/** What the page shows of a row (a record of notus/look/record.py), as elements. */
function describe(row) {
  const asked = row.turns.map(([role, text]) =>
    el("section", { class: "turn", "aria-label": role }, el("h3", {}, role), prose(text)));
  const earlier = row.turns.slice(0, -1).map(([role]) => role).join(", ");
  const pair = row.chosen === null ? [] : [row.chosen, row.rejected];
  const others = [...row.responses.keys()].filter((place) => !pair.includes(place));
  const bodies = row.responses.map(({ text }) => texts(text));
  const compared = pair.length ? compare(...pair.map((place) => row.responses[place].text)) : [];
  compared?.forEach((nodes, k) => (bodies[pair[k]] = nodes));
  const tags = [outcome(row) === "pair" ? "" : `dropped: ${outcome(row)}`, ...row.flags, row.source ?? ""];
  const rules = Object.entries(row.rules ?? {}).map(([rule, reason]) => `${rule}: no pair (${reason})`);
  const numbers = Object.entries(row.numbers);
  return [
    el("p", { class: "tags" }, ...tags.filter(Boolean).map((tag) => el("span", {}, ...texts(tag)))),
    ...(earlier ? [folded(`${counted(asked.length - 1, "earlier message")}: ${earlier}`, ...asked.slice(0, -1))] : []),
    ...asked.slice(-1),
    ...(compared ? [] : [el("p", { class: "hint" }, "Too long to compare word by word.")]),
    el("div", { class: "responses" }, ...[...pair, ...others].map((place) => response(row, place, bodies[place]))),
    ...rules.map((text) => el("p", { class: "hint" }, ...texts(text))),
    ...(numbers.length ? [folded("Numbers", table(numbers.map(([name, value]) => [name, fixed(value)])))] : []),
  ];
}
