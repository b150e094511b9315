"""The page in a real browser: headless Chromium opens it, sorts, filters, brushes, marks, saves."""

import json
import re
import shutil

import pytest

from browser import CHROMIUM, Browser
from notus.curation import report as curation_report
from notus.curation.command import main as curate
from notus.curation.marks import fingerprint
from notus.look.look import main
from notus.look.page import make_page

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

HOSTILE = (
    "</script><script>document.title = 'run'</script> <img src=x onerror=\"document.title='run'\">"
    " <b>bold</b> \u202etxt.exe\u202c a\u200bb \x1b[31mred &amp; {{DATA}} <!-- \u2028"
)
ASPECTS = ("helpfulness", "honesty")


def completion(text, rating, overall):
    annotations = {aspect: {"Rating": rating, "Rationale": HOSTILE} for aspect in ASPECTS}
    about = {"response": text, "model": HOSTILE, "critique": HOSTILE, "overall_score": overall}
    return about | {"annotations": annotations}


def raw(prompt, bad, good, source, overall=8):
    """Two responses: `bad` has the mean 2 and, by `overall`, perhaps the higher overall score."""
    completions = [completion(bad, "2", overall), completion(good, "4", 9)]
    return {"source": source, "instruction": prompt, "completions": completions}


ROWS = [raw(f"q{i}", f"bad {i} " + "x" * (i % 7), "good", f"s{i % 3}") for i in range(100)]
ROWS[7] = raw("planted one", "the same bad words", "the same good words", "s1", overall=10)
ROWS[8] = raw("planted two", "bad", "good", "s2", overall=10)
ROWS[50] = raw(HOSTILE, HOSTILE + " more", HOSTILE + " less", HOSTILE, overall=10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests."""
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with rows and their page under the overall score."""
    folder = tmp_path_factory.mktemp("look")
    lines = (json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    words = [str(folder / "rows.jsonl"), "--curation", '{"rule": "overall-score"}']
    assert main([*words, "--out", str(folder / "page.html")]) == 0
    return folder


@pytest.fixture
def page(browser, made):
    """The browser with the page just opened; the test must leave it without a complaint."""
    browser.open(made / "page.html")
    yield browser
    assert browser.problems == []
    assert browser.requests == [(made / "page.html").as_uri()]


SHOWN = "order.map(i => rows[i].where.split(':').pop() - 1)"


def choose(page, name, value):
    """Set a field of the page as a person does; the rows that are shown then."""
    kind = "input" if name == "text" else "change"
    page.evaluate(f"$({name!r}).value = {json.dumps(value)}; 0")
    page.evaluate(f"$({name!r}).dispatchEvent(new Event({kind!r})); 0")
    if name == "text":
        page.evaluate("new Promise(done => setTimeout(done, 250))")
    return page.evaluate(SHOWN)


def text_of(page, selector):
    return page.evaluate(f"document.querySelector({selector!r}).innerText")


@needs_browser
def test_hostile_texts_are_only_texts(page):
    page.evaluate("show(50)")
    assert page.evaluate("document.title").startswith("Pairs of ")
    made = page.evaluate("document.querySelectorAll('img, b, script, iframe, object').length")
    assert (
        made - page.evaluate("document.querySelectorAll('.ratings b').length") == 2
    )  # our scripts
    hidden = page.evaluate(
        "[...document.querySelectorAll('.chosen > .prose .hidden')].map(e => e.textContent)"
    )
    assert hidden == ["U+202E", "U+202C", "U+200B", "U+001B", "U+2028"]
    shown = page.evaluate("document.querySelector('.chosen > .prose').textContent")
    for character in "\u202e\u202c\u200b\x1b\u2028":
        shown = shown.replace(f"U+{ord(character):04X}", character)
    assert shown == HOSTILE + " more"
    assert page.evaluate("rows[50].responses[0].critique") == HOSTILE
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.prose')).unicodeBidi") == "isolate"
    )


@needs_browser
def test_the_policy_forbids_what_is_injected(browser, made):
    """Even if a text became markup: no script of it runs, and nothing is requested."""
    browser.open(made / "page.html")
    listen = "addEventListener('securitypolicyviolation', e => found.push(e.effectiveDirective))"
    browser.evaluate(f"window.found = []; {listen}")
    image = "<img src=https://example.org/x onerror='window.ran = 1'>"
    browser.evaluate(f'$("row").innerHTML = "{image}"; 0')
    script = "Object.assign(document.createElement('script'), {text: 'window.ran = 1'})"
    browser.evaluate(f"document.body.append({script})")
    assert browser.evaluate("fetch('https://example.org/y').then(() => 1, () => 0)") == 0
    browser.wait_until(lambda: browser.evaluate("found.length >= 4"))
    refused = {"img-src", "script-src-attr", "script-src-elem", "connect-src"}
    assert set(browser.evaluate("found")) == refused
    assert browser.evaluate("window.ran === undefined")


@needs_browser
def test_a_row_with_ratings_and_differences(page):
    page.evaluate("show(7); 0")
    assert page.evaluate(
        "[...document.querySelectorAll('mark')].map(e => e.textContent.trim())"
    ) == [*("bad", "good")]
    facts = page.evaluate("[...document.querySelectorAll('.facts')].map(e => e.textContent)")
    assert facts[0] == "mean rating 2, overall score 10, 18 characters"
    picks = page.evaluate(
        "[...document.querySelectorAll('.picks')].map(e => e.innerText.split('\\n').join())"
    )
    assert "overall-score: chosen" in picks[0] and "mean-rating: chosen" in picks[1]
    assert page.evaluate("document.querySelectorAll('#row details[open]').length") == 0
    assert "the rules disagree" in text_of(page, ".tags")


@needs_browser
def test_a_text_of_millions_of_characters(page):
    """Its beginning is shown, and nothing is compared: the browser would not answer for minutes."""
    page.evaluate("rows[7].turns[0][1] = rows[7].responses[0].text = 'xy '.repeat(4e6); show(7); 0")
    ends = "[...document.querySelectorAll('.prose')].map(e => e.lastChild.textContent)"
    assert page.evaluate(ends)[:2] == ["11,800,000 more characters"] * 2
    assert "Too long to compare word by word." in text_of(page, "#row .hint")


@needs_browser
def test_sorting(page):
    lengths = [
        len(r["completions"][1]["response"]) - len(r["completions"][0]["response"]) for r in ROWS
    ]
    for i in (7, 8, 50):  # the overall score chooses the other one
        lengths[i] = -lengths[i]
    by_length = choose(page, "sort", "length, difference")
    assert by_length == sorted(range(100), key=lambda i: (lengths[i], i))
    page.evaluate("$('direction').click()")
    assert page.evaluate(SHOWN) == sorted(range(100), key=lambda i: (-lengths[i], i))
    drawn = page.evaluate(
        "[...document.querySelectorAll('#items .value')].slice(0, 2).map(e => +e.textContent)"
    )
    assert drawn == sorted(lengths)[:-3:-1]


@needs_browser
def test_filters(page):
    assert choose(page, "flag", "overall score 10 and mean below 3") == [7, 8, 50]
    assert choose(page, "source", "s1") == [7]
    assert text_of(page, "#shown") == "1 of 100 rows shown"
    page.evaluate("$('reset').click()")
    assert choose(page, "text", "PLANTED") == [7, 8]
    assert choose(page, "text", HOSTILE[:40]) == list(range(100))  # it is in every critique
    assert choose(page, "text", "nowhere") == []
    assert "No row passes" in text_of(page, "#row")


@needs_browser
def test_brushing(page):
    size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    page.evaluate("new Promise(done => { $('numbers').open = true; setTimeout(done, 100); })")
    box = page.evaluate(
        "(() => { const all = [...document.querySelectorAll('fieldset')];"
        " const one = all.find(f => f.innerText.startsWith('overall score, chosen'));"
        " const b = one.querySelector('svg').getBoundingClientRect();"
        " return [b.left, b.right, b.top + b.height / 2]; })()"
    )
    left, right, middle = box
    page.drag(((left + right) / 2, middle), (right - 1, middle))  # from 9.5 up, of 9 to 10
    low, high = page.evaluate("ranges.get('overall score, chosen')")
    assert low == pytest.approx(9.5, abs=0.01) and high == pytest.approx(10, abs=0.01)
    page.drag(((left + right) / 2, middle), (right + 50, middle))
    assert page.evaluate(SHOWN) == [7, 8, 50]
    page.drag((left + 9, middle), (left + 9, middle))  # a click lifts it
    assert len(page.evaluate(SHOWN)) == 100
    typed = "document.querySelector('[aria-label=\"overall score, chosen, from\"]')"
    page.evaluate(f"{typed}.value = '9.5'; {typed}.dispatchEvent(new Event('change')); 0")
    assert page.evaluate(SHOWN) == [7, 8, 50]


@needs_browser
def test_keys_and_links(browser, made, page):
    for key, row in (("n", 1), ("ArrowRight", 2), ("p", 1), ("ArrowLeft", 0), ("p", 0)):
        page.key(key)
        assert page.evaluate("current") == row
    link = page.evaluate("(show(63), $('link').href)")
    assert link.endswith("rows.jsonl%3A64")
    browser.open(made / "page.html", "#" + link.partition("#")[2])
    assert browser.evaluate("current") == 63 and "q63" in text_of(browser, "#row")
    assert browser.evaluate("document.querySelector('#items [aria-current]').innerText") == "q63"


@needs_browser
def test_marks_are_saved_and_read_by_curation(page, made, tmp_path, monkeypatch):
    """Marks of planted rows: the wrong pair is turned round, the other one left out."""
    monkeypatch.setattr(curation_report, "find_spec", lambda name: None)
    page.evaluate("show(7); 0")
    page.key("s")
    page.evaluate(
        "$('note').value = 'the critique \u201csays\u201d so';"
        " $('note').dispatchEvent(new Event('input'))"
    )
    page.evaluate("show(8)")
    page.key("d")
    page.evaluate("show(9)")
    page.key("k")
    page.evaluate("show(10)")
    page.key("d")
    page.key("d")  # lifts it
    assert page.evaluate("$('marked').value = 'any', update(), order") == [7, 8, 9]
    assert text_of(page, "#save") == "Save 3 marks"
    page.evaluate("$('save').click()")
    saved = page.downloads / "marks.jsonl"
    page.wait_until(saved.exists)
    marks = tmp_path / "marks.jsonl"
    shutil.move(saved, marks)
    lines = [json.loads(line) for line in marks.read_text(encoding="utf-8").splitlines()]
    texts = ("the same bad words", "the same good words")
    assert lines[0] == {
        "prompt": fingerprint("planted one"),
        "responses": [fingerprint(text) for text in texts],
        "mark": "swap",
        "note": "the critique \u201csays\u201d so",
        "where": f"{made}/rows.jsonl:8",
    }
    assert [line["mark"] for line in lines] == ["swap", "drop", "keep"]
    words = [str(made / "rows.jsonl"), "--rule", "overall-score", "--marks", str(marks)]
    assert curate([*words, "--out", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["marks"] == {"swap": 1, "drop": 1, "keep": 1}
    pairs = [
        json.loads(line) for line in (tmp_path / "out/jsonl/train.jsonl").open(encoding="utf-8")
    ]
    turned = next(pair for pair in pairs if pair["instruction"] == "planted one")
    assert (turned["chosen_response"], turned["rejected_response"]) == texts[::-1]
    assert "planted two" not in {pair["instruction"] for pair in pairs}

    # The page of the curated folder knows the marks, and saves the same ones.
    assert main([str(tmp_path / "out"), "--out", str(tmp_path / "again.html")]) == 0
    requests = page.requests[:]
    page.open(tmp_path / "again.html")
    assert page.evaluate("[...marks.keys()]") == [7, 8, 9]
    found = page.evaluate(
        "[...marks.keys()].map(i => ({...rows[i].key, ...marks.get(i), where: rows[i].where}))"
    )
    assert found == lines
    page.requests[:] = requests


@needs_browser
def test_all_shown_rows_are_marked_alike(page):
    choose(page, "flag", "the rules disagree")
    page.key("d")
    page.evaluate("$('all').click()")
    assert page.evaluate("[...marks].map(([i, m]) => [i, m.mark])") == [
        [i, "drop"] for i in (7, 8, 50)
    ]
    page.key("d")
    page.evaluate("$('all').click()")
    assert page.evaluate("marks.size") == 0


@needs_browser
def test_controls_have_names(page):
    """Every control has a label, a text or an aria-label; the accessibility tree says so."""
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "combobox", "searchbox", "textbox", "spinbutton", "link")
    names = [
        n["name"]["value"]
        for n in nodes
        if n.get("role", {}).get("value") in roles and not n["ignored"]
    ]
    assert len(names) > 30 and all(names)
    page.call("Accessibility.disable")


# The least contrast of text with the background that it is drawn on, by WCAG 2's formula.
CONTRAST = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => numbers(colour).slice(0, 3).map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  const says = (node) => node.matches("input, select")
    || [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const shown = [...document.querySelectorAll("body *")]
    .filter((node) => says(node) && !node.disabled && node.getClientRects().length);
  const found = shown.map((node) => {
    const both = [getComputedStyle(node).color, behind(node)].map(luminance).sort((a, b) => b - a);
    return [(both[0] + 0.05) / (both[1] + 0.05), node.outerHTML.slice(0, 80)];
  });
  return [found.length, ...found.sort((a, b) => a[0] - b[0])[0]];
})()"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(page, scheme):
    """At least 4.5, as WCAG AA asks, with everything unfolded and a marked row in the list."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", features=features)
    page.evaluate("show(50)")
    page.key("d")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    count, least, node = page.evaluate(CONTRAST)
    assert count > 100 and least >= 4.5, node
    page.call("Emulation.setEmulatedMedia", features=[])


@needs_browser
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_is_wider_than_the_screen(page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    page.evaluate("show(50)")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.call("Emulation.clearDeviceMetricsOverride")


def test_texts_of_rows_are_not_in_the_page_as_they_are():
    page = make_page("a <b> {{DATA}}", {"rows": [HOSTILE]})
    assert "onerror" not in page and "a &lt;b&gt; {{DATA}}" in page
    assert len(re.findall("</script>", page)) == 2
    assert re.search("default-src 'none'; script-src 'sha256-[^']+='; style-src 'sha256-", page)
