// The filters by numbers: page.js has `rows`, `order`, `ranges` and `drawings`.

const BINS = 40; // also the width of the picture in page.html

/** The filter of a number: a picture of its values, to drag over, and its ends, to type. */
function histogram(name) {
  const field = $("histogram").content.cloneNode(true).firstElementChild;
  const [svg, ...inputs] = field.querySelectorAll("svg, input");
  const [all, shown, brush] = svg.children;
  const found = (places) => places.map((i) => rows[i].numbers[name]).filter((x) => x !== undefined);
  const values = found(rows.map((_, i) => i)).sort((a, b) => a - b);
  const low = values[0], high = values.at(-1), span = high - low || 1;
  const binned = (values) => {
    const counts = new Array(BINS).fill(0);
    for (const x of values) counts[Math.min(BINS - 1, Math.floor((x - low) / span * BINS))]++;
    return counts;
  };
  const most = Math.max(...binned(values));
  const bars = (values) => binned(values).map((n, k) =>
    n ? `M${k} 1V${1 - Math.sqrt(n / most)}H${k + 0.9}V1Z` : "").join("");
  const drawBrush = (range) => {
    const [from, to] = (range ?? [low, low]).map((x) => (Math.min(high, Math.max(low, x)) - low) / span * BINS);
    brush.setAttribute("x", from);
    brush.setAttribute("width", to - from);
  };
  const set = (range) => {
    if (range) ranges.set(name, range);
    else ranges.delete(name);
    update();
  };

  field.querySelector("legend").textContent = name;
  all.setAttribute("d", bars(values));
  inputs.forEach((input, k) => {
    input.setAttribute("aria-label", `${name}, ${["from", "to"][k]}`);
    input.placeholder = fixed([low, high][k]);
    input.addEventListener("change", () => {
      const [from, to] = inputs.map((input) => input.value === "" ? null : Number(input.value));
      set(from === null && to === null ? null : [from ?? -Infinity, to ?? Infinity]);
    });
  });
  let anchor; // where dragging began
  const valueAt = (event) => {
    const box = svg.getBoundingClientRect();
    return low + span * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  };
  const dragged = (event) => [anchor, valueAt(event)].sort((a, b) => a - b);
  svg.addEventListener("pointerdown", (event) => {
    anchor = valueAt(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (svg.hasPointerCapture(event.pointerId)) drawBrush(dragged(event));
  });
  svg.addEventListener("pointerup", (event) => {
    const range = dragged(event);
    set(range[1] - range[0] > span / 200 ? range : null); // a click lifts the filter
  });
  drawings.push(() => {
    const range = ranges.get(name);
    shown.setAttribute("d", bars(found(order)));
    drawBrush(range);
    inputs.forEach((input, k) => (input.value = range && Number.isFinite(range[k]) ? fixed(range[k]) : ""));
  });
  return field;
}

function drawHistograms() {
  if ($("numbers").open) for (const draw of drawings) draw();
}
