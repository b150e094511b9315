"""The page's records of rows, and its counts, which are those of curation and training."""

import json
import shlex
from pathlib import Path

import pytest

from notus.curation import report as curation_report
from notus.curation.command import main as curate
from notus.curation.curate import Curation
from notus.curation.marks import fingerprint
from notus.data.preferences import Source, load_preferences
from notus.errors import UserError
from notus.look.gather import gather
from notus.look.look import command_for, main
from notus.look.scores import Scores

SHARED = Path(__file__).parents[3] / "shared/data"
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr(curation_report, "find_spec", lambda name: None)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def completion(text, ratings, overall):
    annotations = {
        a: {"Rating": r, "Rationale": f"{a}!"} for a, r in zip(ASPECTS, ratings, strict=True)
    }
    return {"response": text, "model": "m", "critique": "so", "overall_score": overall} | {
        "annotations": annotations
    }


def raw(prompt, *completions):
    return {"source": "flan", "instruction": prompt, "completions": list(completions)}


PLANTED = raw("p?", completion("bad", "1211", 10), completion("good", "5555", 9))
TIED = raw("t?", completion("x", "3333", 7), completion("y", "3333", 6))
EMPTY = raw("e?", completion("", "5555", 9), completion("z", "1111", 1))
THREE = raw(
    "m?", completion("5", "5555", 5), completion("4", "4444", 5), completion("1", "1111", 5)
)
RAW = [PLANTED, TIED, EMPTY, raw("n?", completion("N", ["N/A"] * 4, 3))]


def records(path, curation=None, scores=None):
    source = Source(path=path, curation=curation)
    gathering = gather(source, 42, scores)
    return list(gathering), gathering.counts


def test_a_planted_row(tmp_path):
    (record, *_), _ = records(write(tmp_path / "a.jsonl", RAW), Curation(rule="overall-score"))
    bad, good = record["responses"]
    assert (record["chosen"], record["rejected"], record["dropped"]) == (0, 1, None)
    assert record["flags"] == ["the rules disagree", "overall score 10 and mean below 3"]
    assert bad["picks"] == ["mean-rating: rejected", "overall-score: chosen"] + [
        "overall-score-fixed: rejected"
    ]
    assert good["picks"][0] == "mean-rating: chosen"
    assert (bad["mean rating"], bad["overall score"]) == (1.25, 10)
    assert bad["ratings"][1] == ["honesty", "2", "honesty!"] and bad["critique"] == "so"
    assert record["numbers"] == {
        **{"mean rating, difference": -3.75, "mean rating, chosen": 1.25},
        **{"mean rating, rejected": 5.0, "overall score, difference": 1.0},
        **{"overall score, chosen": 10.0, "overall score, rejected": 9.0},
        **{"length, difference": -1, "length, chosen": 3, "length, rejected": 4},
        "overall score / 2 - mean rating": 3.75,
    }
    assert record["turns"] == [("prompt", "p?")] and record["source"] == "flan"
    assert record["key"]["responses"] == [fingerprint("bad"), fingerprint("good")]


def test_rows_without_a_pair_show_their_responses(tmp_path):
    found, counts = records(write(tmp_path / "a.jsonl", RAW))
    assert [record["dropped"] for record in found] == [
        *(None, "tied ratings", None, "fewer than two rated completions")
    ]
    assert found[1]["rules"] == {"mean-rating": "tied ratings"}
    assert [response["text"] for response in found[1]["responses"]] == ["x", "y"]
    assert found[1]["chosen"] is None and len(found[3]["responses"]) == 1
    assert found[2]["unusable"] == "empty chosen response"
    assert counts["pairs that the trainer drops"] == {"empty chosen response": 1}


def counts_of_curation(folder):
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    return {name: counts[name] for name in ("rows", "pairs", "dropped")} | {
        "pairs that the trainer drops": counts["pairs that the trainer drops"]
    }


@pytest.mark.parametrize(
    "rule, more",
    [
        ("mean-rating", {}),
        ("overall-score-fixed", {}),
        ("mean-rating", {"rejected": "all-lower", "min_margin": 1.5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["own", "uf_raw_SYNTHETIC_cases.jsonl"])
def test_counts_are_those_of_curation(tmp_path, name, rule, more):
    """Of the rows with the same options, and of the curated folder."""
    path = SHARED / name
    if name == "own":
        path = Path(write(tmp_path / "a.jsonl", [*RAW, PLANTED, THREE]))
    elif not path.is_file():
        pytest.skip(f"{path} is not there")
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "p?"}])
    folder = tmp_path / "out"
    options = ["--rule", rule, "--duplicates", "exact", "--decontaminate", prompts]
    options += [w for key, x in more.items() for w in (f"--{key.replace('_', '-')}", str(x))]
    assert curate([str(path), "--out", str(folder), *options]) == 0
    curation = Curation(rule=rule, duplicates="exact", decontaminate=(prompts,), **more)
    expected = counts_of_curation(folder)
    assert records(str(path), curation)[1] == expected
    found, counts = records(str(folder))
    assert counts == expected
    assert len(found) == expected["pairs"] + sum(expected["dropped"].values())
    lines = (folder / "jsonl/train.jsonl").read_text().splitlines()
    pairs = [
        (r["responses"][r["chosen"]], r["responses"][r["rejected"]])
        for r in found
        if not r["dropped"]
    ]
    assert [(a["text"], b["text"]) for a, b in pairs] == [
        (pair["chosen_response"], pair["rejected_response"]) for pair in map(json.loads, lines)
    ]


@pytest.mark.parametrize("name", ["own", "uf_binarized_trl_eval_200.jsonl"])
def test_counts_are_those_of_training(tmp_path, name):
    path = SHARED / name
    if name == "own":
        rows = [{"prompt": "a", "chosen": c, "rejected": "r"} for c in ("x", "", "r", "y")]
        path = write(tmp_path / "a.jsonl", rows)
    elif not path.is_file():
        pytest.skip(f"{path} is not there")
    curation = Curation(duplicates="near")
    expected = load_preferences([Source(path=str(path), curation=curation)], seed=0)
    found, counts = records(str(path), curation)
    dropped = counts["dropped"] + counts["pairs that the trainer drops"]
    assert dropped == expected.dropped
    assert counts["pairs"] - sum(counts["pairs that the trainer drops"].values()) == len(
        expected.train
    )
    assert counts["rows"] == len(found)


def test_earlier_marks_are_shown(tmp_path):
    """A swap too: the key remains that of the pair that was marked, so it is saved unchanged."""
    key = {"prompt": fingerprint("p?"), "responses": [fingerprint("bad"), fingerprint("good")]}
    marks = write(tmp_path / "marks.jsonl", [key | {"mark": "swap", "note": "see"}])
    curation = Curation(rule="overall-score", marks=marks)
    (record, *_), _ = records(write(tmp_path / "a.jsonl", RAW), curation)
    assert (record["chosen"], record["rejected"]) == (1, 0)
    assert record["key"] == key and record["mark"] == {"mark": "swap", "note": "see"}


def test_scores_are_found_by_texts(tmp_path):
    """log-ratios by hand: 1 - 3 and 5 - 2 nats; labels differ by 4 and by 1."""
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": score}
        | {"score_rejected": 1.0}
        for prompt, chosen, rejected, score in (("a", "b", "c", 5.0), ("d", "e", "f", 2.0))
    ]
    scores = [
        dict(zip(names, values, strict=True))
        for names in [
            ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
        ]
        for values in ((-4.0, -3.0, -5.0, -6.0), (-1.0, -3.0, -6.0, -5.0))
    ]
    lines = [
        {**score, **pair, "chosen_score": pair["score_chosen"], "rejected_score": 1.0}
        for pair, score in zip(pairs, scores, strict=True)
    ]
    path = write(tmp_path / "pairs.jsonl", lines)
    swapped = pairs[0] | {"chosen": "c", "rejected": "b"}
    source = write(tmp_path / "a.jsonl", [pairs[1], swapped, pairs[0], pairs[0] | {"prompt": "q"}])
    found, _ = records(source, scores=Path(path))
    assert [r["numbers"].get("model margin") for r in found] == [3.0, 2.0, -2.0, None]
    assert [r["numbers"].get("disagreement") for r in found] == [-0.5, None, 0.5, None]
    assert found[1]["numbers"]["policy chosen"] == found[2]["numbers"]["policy rejected"] == -3.0
    assert ["the model contradicts the label" in r["flags"] for r in found] == [
        *(False, False, True, False)
    ]
    for name in ("pairs.jsonl", "eval_pairs.jsonl"):  # of eval.py preferences, of a run
        Path(path).rename(path := tmp_path / name)
        own, _ = records(str(tmp_path))
        assert [r["numbers"]["model margin"] for r in own] == [-2.0, 3.0]


def test_mistakes(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    score = {"policy_chosen": -1.0, "policy_rejected": -2.0}
    other = write(
        tmp_path / "other.jsonl", [score | {"prompt": "x", "chosen": "b", "rejected": "c"}]
    )
    folder = tmp_path / "curated"
    ratings = write(tmp_path / "raw.jsonl", RAW)
    assert curate([ratings, "--out", str(folder)]) == 0
    write(tmp_path / "raw.jsonl", RAW[:1])
    (tmp_path / "run").mkdir()
    write(tmp_path / "run/metrics.jsonl", [{"step": 1, "loss": 0.5}])
    for words, message in (
        ([path, "--rows", "0"], "--rows: found 0, expected an integer of at least 1"),
        ([path, "--curation", "{"], "--curation: not JSON"),
        ([path, "--columns", "[" * 100_000], "--columns: not JSON"),
        (["~nobody-here/x"], "~nobody-here/x: cannot be read: Could not determine home"),
        (["a" * 300], "File name too long"),
        ([path, "--curation", '{"rul": "rating"}'], "curation.rul: unknown key; nearest"),
        ([path, "--scores", path], "a.jsonl:1: no usable policy_chosen, policy_rejected; expected"),
        ([path, "--scores", other], "other.jsonl: none of its pairs is in"),
        ([str(folder)], "raw.jsonl: gives 1 rows now, and gave 4 when the folder was made"),
        ([str(tmp_path / "run")], "run: a run without held-out pairs (data.eval); expected"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl: no such file or folder"),
    ):
        assert main([*words, "--out", str(tmp_path / "page.html")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_the_command_of_a_source():
    source = Source(path="my pairs.jsonl", curation=Curation(rule="rating", duplicates="near"))
    assert command_for(source, 7) == (
        "python -m notus.look 'my pairs.jsonl' "
        """--curation '{"rule": "rating", "duplicates": "near"}' --seed 7 --out page.html"""
    )
    assert command_for(Source(path="a"), 7) == "python -m notus.look a --out page.html"


@pytest.mark.parametrize("form", [None, "turns"])
def test_the_command_of_a_source_with_other_columns(tmp_path, form):
    """The page of a spreadsheet is made by the command that the dry run names."""
    file = tmp_path / "answers.csv"
    file.write_text("Question,Good,Bad,functions\nWhy?,So.,No.,f\n", encoding="utf-8")
    columns = {"prompt": "Question", "chosen": "Good", "rejected": "Bad"}
    source = Source(path=str(file), format=form, columns=columns, ignore=("functions",))
    page = tmp_path / "page.html"
    *options, last = shlex.split(command_for(source, 7))[3:]
    assert (main([*options, str(page)]), last) == (0, "page.html")
    (record,) = gather(source, 7, None)
    assert [text for _, text in record["turns"]] == ["Why?"]
    texts = [record["responses"][record[side]]["text"] for side in ("chosen", "rejected")]
    assert [text.strip() for text in texts] == ["So.", "No."]


NO_NUMBERS = ("NaN", "Infinity", "1e400", "1" + "0" * 400, "[5]", '"5"')
NO_USE = {
    **dict.fromkeys(("policy_chosen", "reference_rejected"), ("null", *NO_NUMBERS)),
    "chosen_score": NO_NUMBERS,
    "prompt": ("null", "5", "NaN", "[5]"),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in NO_USE for v in NO_USE[n]])
def test_scores_that_are_of_no_use(tmp_path, name, value):
    """The page's JSON holds finite numbers, or the browser would show nothing."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "rejected_score": 1.0}
    row |= {"policy_chosen": -1.0, "policy_rejected": -2.0, name: ...}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row, default=lambda _: "VALUE").replace('"VALUE"', value))
    with pytest.raises(UserError, match=f"pairs.jsonl:1: no usable {name}; expected"):
        Scores(file)


def test_a_margin_that_overflows_is_left_out(tmp_path):
    row = {"prompt": "a", "responses": ["b", "c"], "ratings": [1e308, -1e308]}
    (record,) = gather(Source(path=write(tmp_path / "a.jsonl", [row])), 7, None)
    assert (
        record["numbers"]["rating, chosen"] == 1e308
        and "rating, difference" not in (record["numbers"])
    )


def test_the_page_is_not_written(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for out in (f"{path}/page.html", str(tmp_path), "/proc/none/page.html"):
        assert main([path, "--out", out]) == 2
        assert f"{out}: cannot be written" in capsys.readouterr().err


DAMAGED = {
    "counts: missing, expected an object": {},
    'counts: rows: found "4", expected an integer': {"counts": {"rows": "4", "pairs": 3}},
    'held_out: found "a"': {"counts": {"rows": 4, "pairs": 3}, "held_out": "a"},
    'seed: found "a", expected an integer': {"counts": {"rows": 4, "pairs": 3}, "seed": "a"},
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_manifest(tmp_path, message):
    write(tmp_path / "train.jsonl", RAW)
    manifest = {"input": str(tmp_path / "train.jsonl"), **DAMAGED[message]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        gather(Source(path=str(tmp_path)), 7, None)
    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'}: {message}")


def test_a_folder_of_rated_rows_has_a_manifest_too(tmp_path):
    write(tmp_path / "train.jsonl", RAW)
    (tmp_path / "manifest.json").write_text(json.dumps({"judge": "check", "rows": 4}))
    assert len(list(gather(Source(path=str(tmp_path)), 7, None))) == len(RAW)


def test_a_name_that_is_mapped_and_ignored(tmp_path):
    """The page reads the first row as training does."""
    row = {"prompt": "x", "question": "Why?", "chosen": "So.", "rejected": "No."}
    path = write(tmp_path / "pairs.jsonl", [row])
    source = Source(path=str(path), columns={"prompt": "question"}, ignore=("prompt",))
    (record,) = gather(source, 7, None)
    assert [text for _, text in record["turns"]] == ["Why?"]
