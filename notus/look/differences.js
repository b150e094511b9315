// The words of a response that the other one lacks.

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

/** Two texts as nodes; null if they are too long to compare. */
function compare(...two) {
  if (two.some((text) => text.length > MOST_SHOWN)) return null;
  const parts = two.map(words);
  const flags = common(...parts.map((found) => found.map((word) => word.trim())));
  return flags && parts.map((found, k) => marked(found, flags[k]));
}
