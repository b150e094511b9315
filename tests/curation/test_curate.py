import datetime
import hashlib
import importlib.util
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from notus.curation import report as curation_report
from notus.curation.command import curate, main
from notus.curation.curate import Curation, Screen, curate_row
from notus.curation.decontamination import Dropped
from notus.curation.rated_rows import read_ultrafeedback
from notus.curation.rows import read_rows
from notus.data.formats import Pair
from notus.data.preferences import load_preferences

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completion(ratings, overall=5, response=None, model="m"):
    """ratings: a character for each aspect; N is "N/A", x no Rating, a space no aspect."""
    annotations = {
        aspect: {} if rating == "x" else {"Rating": "N/A" if rating == "N" else rating}
        for aspect, rating in zip(ASPECTS, ratings, strict=True)
        if rating != " "
    }
    text = f"rated {ratings}" if response is None else response
    return {
        "model": model,
        "response": text,
        "overall_score": overall,
        "annotations": annotations,
    }


def raw(*completions, prompt="Name a colour.", source="flan"):
    return {"source": source, "instruction": prompt, "completions": list(completions)}


def by_mean(**options):
    return Curation(**{"rule": "mean-rating"} | options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """Drawing takes most of a short curation's time."""
    monkeypatch.setattr(curation_report, "find_spec", lambda name: None)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command in a folder of its own: its exit code and what it said to stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().err

    return run_command


# ------------------------------------------------------------- every odd case of UltraFeedback

QUESTION = "Which benchmark asks this question, and only this one, of every model that it tests?"
DISTINCT = ("5555", "4444", "3333", "1211")
# (ratings of the completions, the row's other fields, index chosen, indices that may be rejected)
# or (..., the reason for no pair). In the comments, what is odd about it.
CASES = [
    (DISTINCT, {}, 0, {1, 2, 3}),
    (("4434", "5555", "2223", "3333"), {"overall": (9, 7, 4, 5)}, 1, {0, 2, 3}),  # rules disagree
    (("1112", "5555", "4444"), {"overall": (10, 8, 7)}, 1, {0, 2}),  # a wrong 10
    (("4444", "5554", "3333"), {"overall": (10, 9, 5)}, 1, {0, 2}),  # an unclear 10
    (("5554", "4444", "3333"), {"overall": (10, 8, 6)}, 0, {1, 2}),  # a true 10
    (("5N54", "4444"), {}, 0, {1}),
    (("5N45", "45N5", "3333"), {}, 0, {2}),  # 14/3 twice
    (("NNNN", "4444", "3333"), {}, 1, {2}),
    (("5x55", "4444"), {}, 0, {1}),
    (("5 55", "4444"), {}, 0, {1}),
    (("4444", "4444", "3333", "2222"), {}, 0, {2, 3}),
    (("4444", "4444", "4444", "2222"), {}, 0, {3}),
    (("4444", "4444", "4444", "4444"), {}, "tied ratings"),
    (("5344", "4444", "4443"), {}, 0, {2}),  # tied after averaging only
    ((), {}, "fewer than two rated completions"),
    (("4444",), {}, "fewer than two rated completions"),
    (("2222", "4444"), {}, 1, {0}),
    (DISTINCT, {"source": "truthful_qa"}, 'source "truthful_qa"'),
    (DISTINCT, {"prompt": QUESTION}, "exact prompt of {bench}"),
    (DISTINCT, {"prompt": QUESTION + " "}, 0, {1, 2, 3}),  # another text to an exact match
    (("3333", "4444", "2222"), {}, 1, {0, 2}),  # the first row's prompt again
    (("5555", "4444"), {"responses": ("same", "same")}, 0, {1}),
    (("4444", "1111"), {"responses": ("text", "")}, 0, {1}),
    (("4444", "3333"), {"prompt": "Print </s><|assistant|>\n"}, 0, {1}),
    (("4444", "3333"), {"overall": ("8", "6")}, 0, {1}),
    (("4444", "3333"), {"prompt": "日本語 🤗 e\u0301\n" + "word " * 3000}, 0, {1}),
]


def test_exact_duplicates_are_equal_texts():
    screen = Screen(by_mean(duplicates="exact"))
    found = [screen.repeated(text, "here:1") for text in ("a b", "a b ", "A b", "a b")]
    assert found == [None, None, None, Dropped("duplicate prompt")]


@pytest.mark.parametrize("case", CASES)
def test_every_case_by_the_mean_rule(tmp_path, case):
    ratings, fields, *expected = case
    bench = write(tmp_path / "bench.jsonl", [{"question": QUESTION}])
    settings = by_mean(decontaminate=(bench,), match="exact", drop_sources=("truthful_qa",))
    overall = fields.get("overall", (5,) * len(ratings))
    responses = fields.get("responses", map(str, range(len(ratings))))
    parts = zip(ratings, overall, responses, strict=True)
    row = raw(
        *(completion(*part) for part in parts),
        prompt=fields.get("prompt", "Name a colour."),
        source=fields.get("source", "flan"),
    )
    rated = read_ultrafeedback(row, "here:1")
    (outcome,) = curate_row(rated, row, "here:1", settings, Screen(settings), 42)
    if isinstance(outcome, Dropped):
        assert [outcome.reason] == [expected[0].format(bench=bench)]
    else:
        chosen, rejected = (
            next(i for i, one in enumerate(row["completions"]) if one is side)
            for side in outcome[:2]
        )
        assert chosen == expected[0] and rejected in expected[1]


def test_the_first_revisions_lists_of_annotations():
    row = raw(completion("2222"), completion("4444"))
    for one in row["completions"]:
        one["annotations"] = {name: [found] for name, found in one["annotations"].items()}
        one["fine-grained_score"] = None
    rated = read_ultrafeedback(row, "a:1")
    (outcome,) = curate_row(rated, row, "a:1", by_mean(), Screen(by_mean()), 0)
    assert outcome[2:] == (4.0, 2.0)


# ------------------------------------------------------------------------------- the command


def test_pairs_left_out_for_their_scores_are_named_and_counted(tmp_path, capsys):
    rows = [
        raw(completion("5555"), completion("4444"), completion("1111"), prompt="a"),
        raw(completion("3333"), completion("1111"), prompt="b"),
        raw(completion("5553"), completion("4444"), completion("2222"), prompt="c"),
        raw(completion("4444"), completion("4444"), prompt="d"),
    ]
    file, out = write(tmp_path / "raw.jsonl", rows), tmp_path / "out"
    limits = ("--min-margin", "0.5", "--min-chosen", "4", "--agree", "--rejected", "all-lower")
    assert main([file, "--out", str(out), *limits]) == 0
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["rows"], counts["pairs"]) == (4, 3)
    assert counts["dropped"] == {
        "an aspect that prefers the rejected response": 1,
        "chosen score below 4": 1,
        "tied ratings": 1,
    }
    kept = read_lines(out / "jsonl" / "train.jsonl")
    assert [(p["instruction"], p["rejected_avg_rating"]) for p in kept] == [
        ("a", 4.0),
        ("a", 1.0),
        ("c", 2.0),
    ]
    dropped = read_lines(out / "jsonl" / "dropped.jsonl")
    assert [row["instruction"] for row in dropped] == ["b", "c", "d"]
    assert main([file, "--out", str(tmp_path / "no"), "--min-margin", "-1"]) == 2
    assert "--min-margin: found -1.0, expected a number above 0" in capsys.readouterr().err


COLUMNS = [
    "source",
    "instruction",
    "chosen_response",
    "rejected_response",
    "chosen_avg_rating",
    "rejected_avg_rating",
    "chosen_model",
]
ROWS = [
    raw(completion("5555", 8, "good", "a"), completion("1111", 10, "bad", "b"), prompt="one"),
    raw(completion("5555", 8), completion("3333", 6), prompt="two", source="sharegpt"),
    raw(completion("4444"), completion("4444"), prompt="three"),
    raw(completion("5555"), completion("3333"), prompt=f"Now: {QUESTION}", source="sharegpt"),
    raw(completion("5555"), completion("3333"), prompt="One!"),
    raw(completion("5555"), completion("3333"), prompt="five", source="truthful_qa"),
    raw(completion("5555"), completion("3333"), prompt="six, held out"),
    raw(completion("5555", 7, ""), completion("3333", 6, "text"), prompt="seven"),
]
DROPPED = {
    "tied ratings": 1,
    "8-grams of bench.jsonl": 1,
    "near-duplicate prompt": 1,
    'source "truthful_qa"': 1,
    "prompt of a held-out row": 1,
}
ALL_OPTIONS = (
    *("--decontaminate", "bench.jsonl", "--held-out", "eval.jsonl"),
    *("--drop-source", "truthful_qa", "--duplicates", "near", "--seed", "7"),
)


@pytest.fixture
def place(tmp_path):
    write(tmp_path / "raw.jsonl", ROWS)
    write(tmp_path / "bench.jsonl", [{"question": QUESTION}])
    write(tmp_path / "eval.jsonl", [{"prompt": "Six; held out."}])
    return tmp_path


def test_the_folder_holds_the_pairs_in_argillas_columns(place, run):
    assert run("raw.jsonl", "--out", "out", *ALL_OPTIONS)[0] == 0
    out = place / "out"
    table = pyarrow.parquet.read_table(out / "train.parquet")
    assert table.column_names == COLUMNS
    assert [str(kind) for kind in table.schema.types] == 4 * ["string"] + 2 * ["double"] + [
        "string"
    ]
    pairs = table.to_pylist()
    assert pairs == read_lines(out / "jsonl" / "train.jsonl")
    assert [pair["instruction"] for pair in pairs] == ["one", "two", "seven"]
    assert list(pairs[0].values()) == ["flan", "one", "good", "bad", 5.0, 1.0, "a"]

    dropped = read_lines(out / "jsonl" / "dropped.jsonl")
    assert Counter(row["reason"] for row in dropped) == DROPPED
    (hit,) = (row for row in dropped if "benchmark_where" in row)
    assert (hit["row"], hit["benchmark_where"]) == ("raw.jsonl:4", "bench.jsonl:1")
    assert hit["benchmark_prompt"] == QUESTION


def test_the_manifest_counts_every_row(place, run):
    run("raw.jsonl", "--out", "out", *ALL_OPTIONS)
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["counts"] == {
        "rows": 8,
        "pairs": 3,
        "dropped": DROPPED,
        "pairs by source": {"flan": 2, "sharegpt": 1},
        "pairs that the trainer drops": {"empty chosen response": 1},
    }
    assert (manifest["input"], manifest["rule"], manifest["seed"]) == (
        "raw.jsonl",
        "mean-rating",
        7,
    )
    for name, digest in manifest["files_sha256"].items():
        assert hashlib.sha256((place / "out" / name).read_bytes()).hexdigest() == digest
    # The input's hash is of its rows, not of the file's bytes.
    (place / "array.json").write_text(json.dumps(ROWS, indent=1))
    run("array.json", "--out", "again", *ALL_OPTIONS)
    again = json.loads((place / "again" / "manifest.json").read_text())
    digests = manifest["rows_sha256"]
    digests["array.json"] = digests.pop("raw.jsonl")
    assert again["rows_sha256"] == digests
    assert again["files_sha256"]["train.parquet"] == manifest["files_sha256"]["train.parquet"]


class Source:
    split, weight, longest_line, format, columns, ignore = None, 1.0, 2**20, None, None, None

    def __init__(self, path, curation=None):
        self.path, self.curation = path, curation


@pytest.mark.parametrize("rule", ["mean-rating", "overall-score", "overall-score-fixed"])
@pytest.mark.parametrize("rejected", ["random", "lowest", "zephyr"])
def test_the_trainer_reads_back_what_a_curated_source_gives(place, run, rule, rejected):
    assert run("raw.jsonl", "--out", "out", "--rule", rule, "--rejected", rejected)[0] == 0
    settings = Curation(rule=rule, rejected=rejected)
    curated = load_preferences([Source("raw.jsonl", settings)], seed=42)

    def content(pairs):
        return [
            (one.prompt, one.chosen, one.rejected, one.chosen_score, one.rejected_score)
            for one in pairs
        ]

    for path in ("out", "out/train.parquet", "out/jsonl/train.jsonl"):
        read_back = load_preferences([Source(path)], seed=42)
        assert content(read_back.train) == content(curated.train) != []
        assert read_back.dropped == {"empty chosen response": 1}
    dropped = json.loads(Path("out/manifest.json").read_text())["counts"]["dropped"]
    assert curated.dropped == {**dropped, "empty chosen response": 1}


def test_pairs_that_the_trainer_drops_are_counted_as_it_counts_them(place, run):
    texts = [(" ", "a", "b"), ("p", "", "b"), ("p", "a", "\n"), ("p", "a", "a"), ("p", "a", "b")]
    rows = [
        raw(completion("5555", 5, good), completion("1111", 5, bad), prompt=prompt)
        for prompt, good, bad in texts
    ]
    write(place / "odd.jsonl", rows)
    run("odd.jsonl", "--out", "odd")
    counts = json.loads((place / "odd" / "manifest.json").read_text())["counts"]
    trained_on = load_preferences([Source("odd")], seed=0)
    assert counts["pairs that the trainer drops"] == trained_on.dropped
    assert len(trained_on.train) == 1


def test_a_curated_source_leaves_out_what_the_command_does(place, run):
    run("raw.jsonl", "--out", "out", *ALL_OPTIONS)
    settings = by_mean(
        decontaminate=("bench.jsonl",), drop_sources=("truthful_qa",), duplicates="near"
    )
    evaluation = [Pair("Six; held out.", "a", "b", "eval.jsonl:1")]
    loaded = load_preferences(
        [Source("raw.jsonl", settings)], seed=7, evaluation=evaluation, drop_leaks=True
    )
    assert loaded.dropped == {**DROPPED, "empty chosen response": 1}


# --------------------------------------------------------------------------------- the report


def test_the_report_says_what_was_found(place, run):
    run("raw.jsonl", "--out", "out", *ALL_OPTIONS)
    report = (place / "out" / "report.md").read_text()
    for line in (
        "| pairs | 3 | 2 | 1 | 0 |",
        '| source "truthful_qa" | 1 | 0 | 0 | 1 |',
        # "good" is longer than "bad", "rated 5555" as long as "rated 3333", "" shorter than "text"
        "| longer response | 1 | 1 |",
        "| mean length in characters | 4.67 | 5.67 |",
        "| mean score | 5.00 | 2.33 |",
        "| raw.jsonl:4 | 8-grams | 100% | bench.jsonl:1 | Which benchmark asks",
        "| empty chosen response | 1 |",
    ):
        assert line in report, line
    assert not (place / "out" / "figures").exists()


def test_figures_are_drawn_where_matplotlib_is_installed(place, run, monkeypatch):
    pytest.importorskip("matplotlib", reason="the report extra is not installed")
    monkeypatch.setattr(curation_report, "find_spec", importlib.util.find_spec)
    run("raw.jsonl", "--out", "out")
    report = (place / "out" / "report.md").read_text()
    for name in ("ratings", "scores"):
        assert f"(figures/{name}.png)" in report
        picture = (place / "out" / "figures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 1000


def test_any_set_of_rated_responses(place, run):
    rows = [
        {"prompt": str(n), "responses": ["a", "b" * n, "c"], "ratings": [10 * n, None, -1]}
        for n in range(60)
    ]
    write(place / "rated.jsonl", rows)
    assert run("rated.jsonl", "--out", "out", "--rule", "rating")[0] == 0
    pairs = read_lines(place / "out" / "jsonl" / "train.jsonl")
    assert [list(pair.values()) for pair in pairs[:2]] == [
        [None, "0", "a", "c", 0.0, -1.0, None],
        [None, "1", "a", "c", 10.0, -1.0, None],
    ]
    report = (place / "out" / "report.md").read_text()
    assert "Not screened" in report and "| pairs | 60 |\n" in report  # of one source
    assert "| agree | no |" in report and "| marks | none |" in report


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("in.jsonl", json.dumps(raw(completion("4446"), completion("1111"))), (),
         "in.jsonl:1: rating of truthfulness is '6'; expected a number from 1 to 5"),
        ("in.jsonl", json.dumps(raw(completion("1111", 11))), ("--rule", "overall-score"),
         "in.jsonl:1: overall_score is 11; expected a number from 1 to 10"),
        ("in.jsonl", f"{json.dumps(ROWS[0])}\n[1]", (), "in.jsonl:2: the row is a list; expected"),
        ("in.jsonl", f"{json.dumps(ROWS[0])}\n{{oops", (), "in.jsonl:2: not JSON"),
        ("in.jsonl", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}),
         ("--rule", "rating"), 'with a rule for rows in the format "preference", which are pairs'),
        ("in.jsonl", json.dumps({"text": "a"}), (), "in.jsonl:1: not a known preference format"),
        ("in.jsonl", json.dumps({"messages": []}), (), "found rows of one response each"),
        ("in.jsonl", json.dumps(ROWS[0]), ("--rule", "rating"),
         "fewer than two rated completions"),
        ("in.jsonl", json.dumps({"prompt": "a", "responses": [], "ratings": []}),
         ("--rule", "overall-score"),
         'the rule "overall-score" does not read rows of the format "rated"; expected "rating"'),
        ("in.jsonl", json.dumps(raw(completion("4444", 5, 3), completion("1111"))), (),
         'in.jsonl:1: "response" is a number; expected text'),
        ("in.jsonl", json.dumps(raw(completion("4444", model=3), completion("1111"))), (),
         'in.jsonl:1: "model" is a number; expected text'),
        ("in.jsonl", json.dumps(raw("text")), (), '"completions" is a list; expected a list of ob'),
        ("in.jsonl", json.dumps(ROWS[2]), (),
         'no pair is left under the rule "mean-rating"; 1 row, dropped: 1 tied ratings'),
        ("in.jsonl", "", (), "in.jsonl: holds no rows"),
        ("in.jsonl", json.dumps(ROWS[0]), ("--decontaminate", "no.jsonl"),
         "no.jsonl: no such file or folder"),
        ("in.jsonl", json.dumps(ROWS[0]), ("--decontaminate", "odd.jsonl"),
         "odd.jsonl:1: no column holds a prompt; found the columns id, answer; expected one of"),
        ("in.jsonl", json.dumps({**ROWS[0], "source": None}), ("--drop-source", "flan"),
         'in.jsonl:1: "source" is null; expected text'),
        ("other.jsonl", "{}", (), "in.jsonl: no such file or folder"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_leaves_nothing_behind(
    tmp_path, run, name, content, options, message
):
    (tmp_path / name).write_text(content)
    write(tmp_path / "odd.jsonl", [{"id": 1, "answer": "b"}])
    before = sorted(os.listdir(tmp_path))
    code, said = run("in.jsonl", "--out", "out", *options)
    assert code == 2 and message in said and "Traceback" not in said
    assert sorted(os.listdir(tmp_path)) == before


def test_an_unknown_rule_is_refused(place, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("raw.jsonl", "--out", "out", "--rule", "best")
    assert stopped.value.code == 2
    assert "'best' (choose from" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_folder_that_exists_is_left_as_it_is(place, run):
    (place / "out").mkdir()
    (place / "out" / "mine").write_text("text")
    code, said = run("raw.jsonl", "--out", "out")
    assert code == 2 and "out: exists already; expected the name of a new folder" in said
    assert os.listdir(place / "out") == ["mine"]
    code, said = run("raw.jsonl", "--out", "raw.jsonl/out")
    assert code == 2 and "raw.jsonl/out: cannot be written" in said
    assert run("raw.jsonl", "--out", "deep/er/out")[0] == 0


def test_an_interrupted_run_leaves_nothing(place, run, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    before = sorted(os.listdir(place))
    monkeypatch.setattr("notus.curation.command.write_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("raw.jsonl", "--out", "out")
    assert sorted(os.listdir(place)) == before


def test_two_runs_into_one_folder_do_not_mix(place, run, monkeypatch):
    """The second starts and ends while the first writes."""
    write_report = curation_report.write_report
    codes = []

    def other_first(*arguments):
        monkeypatch.setattr("notus.curation.command.write_report", write_report)
        codes.append(run("raw.jsonl", "--out", "out", "--seed", "7")[0])
        write_report(*arguments)

    monkeypatch.setattr("notus.curation.command.write_report", other_first)
    code, said = run("raw.jsonl", "--out", "out")
    assert (codes, code) == ([0], 2) and "out: cannot be written" in said
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["seed"] == 7 and (place / "out" / "train.parquet").exists()
    assert not [name for name in os.listdir(place) if "partial" in name]


# ---------------------------------------------------------------------------------- properties

some_completions = st.lists(
    st.builds(
        completion,
        st.text("12345N", min_size=4, max_size=4),
        st.integers(1, 10),
        st.sampled_from(["", "a", "b", "c d"]),
    ),
    max_size=4,
)
some_rows = st.lists(
    st.builds(
        lambda prompt, completions, source: raw(*completions, prompt=prompt, source=source),
        st.sampled_from(["one", "One!", "two", QUESTION, f"Say: {QUESTION}"]),
        some_completions,
        st.sampled_from(["flan", "truthful_qa"]),
    ),
    max_size=8,
)
some_settings = st.builds(
    Curation,
    rule=st.sampled_from(["mean-rating", "overall-score", "overall-score-fixed"]),
    rejected=st.sampled_from(["random", "lowest", "zephyr"]),
    match=st.sampled_from(["exact", "normalised", "n-grams"]),
    drop_sources=st.sampled_from([(), ("truthful_qa",)]),
    duplicates=st.sampled_from(["keep", "exact", "near"]),
)
some_seeds = st.integers(0, 9)


def outcomes(rows, settings, seed):
    screen = Screen(settings)
    found = []
    for row in rows:
        rated = read_ultrafeedback(row, "here")
        found += curate_row(rated, row, "here", settings, screen, seed)
    return found


@given(some_rows, some_settings, some_seeds, st.randoms())
def test_neither_order_nor_removed_duplicates_change_a_pair(rows, settings, seed, random):
    plain = replace(settings, duplicates="keep")
    alone = [outcomes([row], plain, seed)[0] for row in rows]
    assert outcomes(rows, plain, seed) == alone
    order = random.sample(range(len(rows)), len(rows))
    found = outcomes([rows[i] for i in order], settings, seed)
    for index, outcome in zip(order, found, strict=True):
        is_repeat = isinstance(outcome, Dropped) and "duplicate" in outcome.reason
        assert is_repeat or outcome == alone[index]
        assert not (is_repeat and isinstance(alone[index], Dropped))


@hypothesis_settings(max_examples=30, deadline=None)
@given(some_rows, some_settings, some_seeds)
def test_counts_add_up(tmp_path_factory, rows, settings, seed):
    place = tmp_path_factory.mktemp("set")
    always = raw(completion("5555", 9), completion("1111", 2), prompt="another one")
    path = write(place / "raw.jsonl", [*rows, always])
    counts = curate(Source(path, settings), place / "out", (), seed)
    assert counts["rows"] == len(rows) + 1
    assert counts["pairs"] + sum(counts["dropped"].values()) == counts["rows"]
    assert len(read_lines(place / "out" / "jsonl" / "train.jsonl")) == counts["pairs"]
    dropped = read_lines(place / "out" / "jsonl" / "dropped.jsonl")
    assert Counter(row["reason"] for row in dropped) == counts["dropped"]
    assert len(list(read_rows(str(place / "out")))) == counts["pairs"]


# ----------------------------------------------------------------- pairs, and prompts of messages


def test_ready_pairs_are_screened_and_stay_as_they_are(place, run):
    user = {"role": "user", "content": QUESTION}
    answers = [[{"role": "assistant", "content": text}] for text in "ab"]
    chat = {"prompt": [{**user, "content": "Hello?"}], "chosen": answers[0], "rejected": answers[1]}
    rows = [
        {**chat, "tools": [{"name": "w"}], "id": 1, "source": "a"},
        {**chat, "prompt": [user], "source": "b"},
        {**chat, "source": "b"},
    ]
    write(place / "pairs.jsonl", rows)
    options = ("--decontaminate", "bench.jsonl", "--duplicates", "near")
    assert run("pairs.jsonl", "--out", "out", *options)[0] == 0
    assert read_lines(place / "out" / "train.jsonl") == rows[:1]
    reasons = [row["reason"] for row in read_lines(place / "out" / "jsonl" / "dropped.jsonl")]
    assert reasons == ["exact prompt of bench.jsonl", "near-duplicate prompt"]
    assert len(load_preferences([Source("out")], seed=0).train) == 1
    manifest = json.loads((place / "out" / "manifest.json").read_text())
    assert manifest["rule"] is None and "train.jsonl" in manifest["files_sha256"]
    assert "mean score" not in (place / "out" / "report.md").read_text()


def test_a_set_without_benchmarks_is_not_called_screened(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["raw.jsonl", "--out", "out"]) == 0
    assert "; not screened for benchmarks" in capsys.readouterr().out
    assert "Not screened: no file" in (place / "out" / "report.md").read_text()
    write(place / "other.jsonl", [{"question": "Something else entirely?"}])
    assert main(["raw.jsonl", "--out", "two", "--decontaminate", "other.jsonl"]) == 0
    assert "not screened" not in capsys.readouterr().out
    assert "No row holds one." in (place / "two" / "report.md").read_text()


def test_tables_show_the_largest_sources(place, run):
    rows = [
        raw(completion("5555"), completion("1111"), prompt=f"{n} {i}", source=f"s{n:02}")
        for n in range(12)
        for i in range(1 + (n > 1))
    ]
    write(place / "many.jsonl", rows)
    run("many.jsonl", "--out", "out")
    report = (place / "out" / "report.md").read_text()
    names = " | ".join(f"s{n:02}" for n in range(2, 12))
    assert f"|  | all | {names} | (others) |" in report
    assert f"| pairs | 22 | {' | '.join('2' * 10)} | 2 |" in report


def test_prompts_of_several_turns_are_written_as_messages(place, run):
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    answers = [{"answer": "No.", "rank": 2, "model": "m"}, {"answer": "So.", "rank": 1}]
    rows = [{"prompt": text, "answers": answers} for text in (turns, "\n\nHuman: d\n\nAssistant: ")]
    write(place / "nectar.jsonl", rows)
    assert run("nectar.jsonl", "--out", "out")[0] == 0  # the rule is the format's own
    direct = load_preferences([Source("nectar.jsonl", Curation(rule="rating"))], seed=42).train
    read_back = load_preferences([Source("out")], seed=42).train
    assert [vars(one) | {"where": ""} for one in read_back] == [
        vars(one) | {"where": ""} for one in direct
    ]
    write(place / "tools.jsonl", [{**rows[0], "tools": [{"name": "w"}]}])
    code, said = run("tools.jsonl", "--out", "two")
    assert code == 2 and "tools.jsonl:1: the row has tools or options" in said


def test_ready_pairs_keep_what_json_does_not_have(tmp_path):
    day, half = datetime.datetime(2024, 2, 29, 12), "\ud800"
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([row | {"made": day}]), tmp_path / "a.parquet"
    )
    (tmp_path / "b.jsonl").write_text(json.dumps(row | {"id": half}) + "\n")
    for name, other in (("a.parquet", {"made": "2024-02-29 12:00:00"}), ("b.jsonl", {"id": half})):
        out = tmp_path / f"out-{name}"
        assert main([str(tmp_path / name), "--out", str(out)]) == 0
        assert json.loads((out / "train.jsonl").read_text()) == row | other


@pytest.mark.parametrize(
    "options",
    [["--agree"], ["--min-margin", "1"], ["--min-chosen", "1"], ["--rejected", "lowest"]],
)
def test_ready_pairs_have_no_options_of_rated_ones(tmp_path, capsys, options):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text(json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n")
    assert main([str(file), "--out", str(out), *options]) == 2 and not out.exists()
    assert 'do nothing for rows in the format "preference"' in capsys.readouterr().err


# -------------------------------------------------------------------------- a source of one's own

SHEET = """Question,Good,Bad,context,subset
"Why, so?","So
it is.",No.,a,chat
How?,same,same,,chat
"""
NAMES = {"prompt": "Question", "chosen": "Good", "rejected": "Bad"}
MAPPED = ("--format", "turns", "--columns", json.dumps(NAMES))


def test_a_set_with_other_columns(tmp_path, run, capsys):
    """The folder is the pairs that training reads from the source with the same keys."""
    (tmp_path / "sheet.csv").write_text(SHEET)
    code, said = run("sheet.csv", "--out", "out", *MAPPED)
    assert code == 2 and said.startswith('error: sheet.csv:2: "context" is not read by the format')
    assert said.endswith("\n  as options of this command: --ignore context\n")
    assert main(["sheet.csv", "--out", "out", *MAPPED, "--ignore", "context"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        'sheet.csv: 2 rows of the format "turns"',
        'sheet.csv: "context" of 1 rows is ignored',
        "wrote out: 2 pairs; 2 rows, dropped: none; of these pairs training drops: 1 identical "
        "responses; not screened for benchmarks",
    ]
    source = Source("sheet.csv")
    source.format, source.columns, source.ignore = "turns", NAMES, ("context",)
    direct, folder = (load_preferences([one], seed=0) for one in (source, Source("out")))
    (pair,), (read_back,) = direct.train, folder.train
    assert replace(read_back, where=pair.where) == pair
    assert read_back.labels == pair.labels == {"subset": "chat"}
    assert direct.dropped == folder.dropped == {"identical responses": 1}
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {key: manifest[key] for key in ("format", "columns", "ignore")} == {
        "format": "turns",
        "columns": NAMES,
        "ignore": ["context"],
    }


def test_how_to_match_needs_something_to_match(place, run):
    for match in ("exact", "n-grams"):
        code, said = run("raw.jsonl", "--out", "out", "--match", match)
        assert code == 2 and f"--match {match}: has no effect without --decontaminate" in said
    assert (
        run("raw.jsonl", "--out", "out", "--match", "exact", "--decontaminate", "bench.jsonl")[0]
        == 0
    )
