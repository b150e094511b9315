"""Marks on rows: to which rows they belong, and what curation makes of them."""

import hashlib
import json

import pytest

from notus.curation import report as curation_report
from notus.curation.command import main
from notus.curation.curate import Curation
from notus.curation.marks import fingerprint
from notus.data.preferences import Source, load_preferences
from notus.errors import UserError


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(curation_report, "find_spec", lambda name: None)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rated(prompt, *responses, ratings=(3, 2, 1)):
    count = len(responses)
    return {"prompt": prompt, "responses": list(responses), "ratings": list(ratings[:count])}


def a_mark(kind, prompt, *responses, note=""):
    key = {"prompt": fingerprint(prompt), "responses": list(map(fingerprint, responses))}
    return key | {"mark": kind, "note": note, "where": "elsewhere.jsonl:7"}


ROWS = [
    rated("a?", "a1", "a2", "a3"),
    rated("b?", "b1", "b2"),
    rated("c?", "c1", "c2"),
    rated("d?", "d1", "d2"),
]
MARKS = [
    a_mark("drop", "c?", "c1", "c2", note="both are bad"),
    a_mark("swap", "a?", "a1", "a2", note="a2 | is right"),
    a_mark("keep", "b?", "b1", "b2"),
    a_mark(None, "d?", "d1", "d2", note="odd"),
]


def curate(folder, rows, marks, *options):
    """The exit code, the pairs and the manifest of the command."""
    words = [write(folder / "rows.jsonl", rows), "--rule", "rating", "--out", str(folder / "out")]
    code = main([*words, "--marks", write(folder / "marks.jsonl", marks), *options])
    if code:
        assert not (folder / "out").exists()
        return code, None, None
    lines = (folder / "out/jsonl/train.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    texts = [(pair["chosen_response"], pair["rejected_response"]) for pair in pairs]
    return code, texts, json.loads((folder / "out/manifest.json").read_text())


def test_fingerprints():
    assert fingerprint("é") == hashlib.sha256("é".encode()).hexdigest()[:16]
    message = {"role": "assistant", "content": "é"}
    assert fingerprint([message]) == fingerprint("é") != fingerprint([message, message])
    assert fingerprint("\ud800") != fingerprint("\ud801")


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1]], ids=["in order", "reversed"])
def test_marks_are_applied_and_named(tmp_path, rows, capsys):
    _, pairs, manifest = curate(tmp_path, rows, MARKS)
    expected = [("a2", "a1"), ("b1", "b2"), ("d1", "d2")]
    assert sorted(pairs) == expected
    assert manifest["counts"]["dropped"] == {"marked to be dropped": 1}
    assert manifest["counts"]["marks"] == {"swap": 1, "keep": 1, "drop": 1, "note": 1}
    named = {entry["note"]: entry for entry in manifest["marked"]}
    place = rows.index(ROWS[2]) + 1
    assert named["both are bad"]["row"] == f"{tmp_path}/rows.jsonl:{place}"
    assert manifest["marks"] == str(tmp_path / "marks.jsonl") in manifest["rows_sha256"]
    report = (tmp_path / "out/report.md").read_text()
    assert "## Marks" in report and "a2 \\| is right" in report
    command = f"python -m notus.look {tmp_path}/out --out page.html"
    said = capsys.readouterr().out
    assert command in report and command in said and "1 swap" in said


def test_a_swap_holds_under_another_rule_and_draw(tmp_path):
    """The marked pair is taken, also where the rule picks another one or none."""
    tied = rated("t?", "t1", "t2", ratings=(2, 2))
    marks = [a_mark("swap", "a?", "a3", "a2"), a_mark("swap", "t?", "t1", "t2")]
    assert curate(tmp_path, [ROWS[0], tied], marks)[1] == [("a2", "a3"), ("t2", "t1")]


@pytest.mark.parametrize(
    "marks, message",
    [
        ([a_mark("drop", "a?", "a1", "x")], "marks.jsonl:1: no row has this prompt and these"),
        ([a_mark("drop", "x?", "a1", "a2")] * 1, "elsewhere.jsonl:7 when it was marked"),
        ([MARKS[0], MARKS[0]], "marks.jsonl:2: a mark for the row that "),
        ([a_mark("drop", "a?", "a1"), a_mark("keep", "a?", "a2")], "mark this row differently"),
        ([a_mark("swap", "a?", "a1")], "marks.jsonl:1: responses: expected two that differ"),
        ([a_mark("maybe", "a?", "a1", "a2")], 'marks.jsonl:1: mark: found "maybe"'),
        ([{"prompt": "a?"}], "marks.jsonl:1: responses: missing"),
        ([], "marks.jsonl: holds no rows"),
    ],
)
def test_mistakes(tmp_path, marks, message, capsys):
    assert curate(tmp_path, ROWS, marks)[0] == 2
    assert message in capsys.readouterr().err


def test_a_swap_needs_ratings(tmp_path, capsys):
    rows = [rated("a?", "a1", "a2", "a3", ratings=(2, None, 1))]
    assert curate(tmp_path, rows, [a_mark("swap", "a?", "a1", "a2")])[0] == 2
    assert 'that the rule "rating" does not rate' in capsys.readouterr().err


def test_marks_of_ready_pairs(tmp_path):
    """Also marks set on the rated rows that the pairs are from, and on other messages."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{name}?"}], **turns, "score_chosen": 2.0}
        | {"score_rejected": 1.0}
        for name in "abcd"
        for turns in [
            {
                side: [{"role": "assistant", "content": f"{name}{number}"}]
                for side, number in (("chosen", 1), ("rejected", 2))
            }
        ]
    ]
    path, marks = write(tmp_path / "rows.jsonl", rows), write(tmp_path / "marks.jsonl", MARKS)
    source = Source(path=path, curation=Curation(marks=marks))
    found = load_preferences([source], seed=0)
    assert found.dropped == {"marked to be dropped": 1}
    texts = [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in found.train]
    assert texts == [("a2", "a1"), ("b1", "b2"), ("d1", "d2")]
    assert [pair.chosen_score for pair in found.train] == [1.0, 2.0, 2.0]
    command = ["--marks", marks, "--out", str(tmp_path / "out")]
    assert main([path, *command]) == 0  # writes the swapped pair as a row
    curated = load_preferences([Source(path=str(tmp_path / "out"))], seed=0).train
    parts = [(pair.prompt, pair.chosen, pair.rejected) for pair in found.train]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in curated] == parts
    assert [pair.chosen_score for pair in curated] == [1.0, 2.0, 2.0]
    write(tmp_path / "rows.jsonl", rows[:3])
    with pytest.raises(UserError, match="marks.jsonl:4: no row has this prompt"):
        load_preferences([source], seed=0)


def test_a_mark_on_a_conversation_has_the_rows_system_turn(tmp_path):
    """As the page, and pairs.jsonl of `eval.py preferences`, show the prompt."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    sides = {
        side: [{"role": "assistant", "content": text}]
        for side, text in (("chosen", "a"), ("rejected", "b"))
    }
    row = {"system": "Be brief.", "prompt": turns[1:], **sides}
    marks = write(tmp_path / "marks.jsonl", [a_mark("swap", turns, "a", "b")])
    rows, out = write(tmp_path / "rows.jsonl", [row]), tmp_path / "out"
    (pair,) = load_preferences([Source(path=rows, curation=Curation(marks=marks))], seed=0).train
    assert pair.prompt == turns and pair.chosen == sides["rejected"]
    assert main([rows, "--out", str(out), "--marks", marks]) == 0
    written = json.loads((out / "train.jsonl").read_text())
    assert written["prompt"] == turns and written["chosen"] == sides["rejected"]
