"""Own runs compared pair by pair, on runs written by hand whose differences are known."""

import json
import math

import numpy as np
import pytest
from lines import write_lines

import eval as command_line
from notus.errors import UserError
from notus.evals.arms import arms_of, differences_of, differing, scores_of, shared_pairs
from notus.evals.runs import read_run

NAMES = ("accuracies", "margins", "chosen", "rejected")
SETTINGS = {
    "data": {"train": [{"path": "a.jsonl", "curation": {"rule": "mean-rating"}}]},
    "loss": {"name": "sigmoid", "beta": 0.1},
    "train": {"seed": 1},
}


def evaluation(step, loss):
    logged = {f"eval_rewards/{name}": 0.5 for name in NAMES}
    logged |= {"eval_logps/chosen": -1.0, "eval_logps/rejected": -2.0}
    return {"step": step, "eval_loss": loss} | logged


def records(margins, name=None, first=0, source="web"):
    """Pairs number `first` and on; odd ones are longer by 20 tokens where they are chosen."""
    return [
        {"where": f"f:{i}", "source": source, "sha256": f"{name}-{i}", "right": margin > 0}
        | {"margin": margin, "loss": math.log1p(math.exp(-margin))}
        | {"chosen_tokens": 5 + 20 * (i % 2), "rejected_tokens": 5}
        | ({"set": name} if name else {})
        for i, margin in enumerate(margins, first)
    ]


def write_run(folder, rows, settings=SETTINGS, losses=(0.6, 0.4, 0.5), **changes):
    folder.mkdir(parents=True)
    settings = settings | changes | {"output_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps(settings))
    lines = [evaluation(10 * i, loss) for i, loss in enumerate((9.0, *losses))]
    write_lines(folder / "metrics.jsonl", lines)
    if rows:
        write_pairs(folder / "eval_pairs.jsonl", rows)
    return folder


def write_pairs(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, rows)


def compare(capsys, *arguments):
    code = command_line.main(["compare", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_two_runs_on_the_same_pairs_in_another_order(tmp_path, capsys):
    """Of 40 pairs 4 are right in the first run only, 10 in the second only."""
    draw = np.random.default_rng(0)
    size = draw.uniform(0.1, 2.0, (2, 40))
    signs = np.ones((2, 40))
    signs[1, :4] = signs[0, 4:14] = signs[:, 14:20] = -1
    margins = signs * size
    one = write_run(tmp_path / "one", records(margins[0].tolist()))
    shuffled = [records(margins[1].tolist())[i] for i in draw.permutation(40)]
    two = write_run(tmp_path / "two", shuffled, loss={"name": "sigmoid", "beta": 0.5})
    code, out, _ = compare(capsys, one, two, "--json", tmp_path / "out.json", "--seed", "3")
    assert code == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [run["settings"] for run in found["runs"]] == [{"loss.beta": 0.1}, {"loss.beta": 0.5}]
    assert [(run["final"]["step"], run["best"]["step"]) for run in found["runs"]] == [(30, 20)] * 2
    every = found["differences"][0]
    assert (every["pairs"], every["first_more"], every["arm_more"]) == (40, 4, 10)
    tail = sum(math.comb(14, k) for k in range(5))
    assert every["p"] == pytest.approx(2 * tail / 2**14)
    losses = np.log1p(np.exp(-margins))
    expected = [6 / 40, np.mean(losses[1] - losses[0]), np.mean(margins[1] - margins[0])]
    assert every["values"] == pytest.approx(expected)
    # The same bootstrap, written as a loop: one draw of 40 places for each of 10,000 means.
    places = np.random.default_rng(3).integers(40, size=(10_000, 40))
    means = np.sort((margins[1] - margins[0])[places].mean(1))
    assert every["low"][2] == pytest.approx(np.quantile(means, 0.025))
    assert every["high"][2] == pytest.approx(np.quantile(means, 0.975))
    lengths = {d["name"]: d for d in found["differences"] if d["kind"] == "chosen longer by"}
    assert {name: d["pairs"] for name, d in lengths.items()} == {
        "-10 to below 11": 20,
        "11 to below 51": 20,
    }
    odd = slice(1, None, 2)
    longer = lengths["11 to below 51"]["values"]
    assert longer[2] == pytest.approx(np.mean((margins[1] - margins[0])[odd]))
    assert "two  0.5 " in out and "only accuracies compare" in out


def test_both_models_on_both_labelings(tmp_path):
    """Sets that data.eval names, and results in evals/, each with the pairs that all runs have."""
    runs = []
    for name, critique, ratings in (("a", 1.0, -1.0), ("b", -1.0, 1.0)):
        rows = records([critique] * 5, "critique") + records([ratings] * 8, "ratings")
        folder = write_run(tmp_path / name, rows, train={"seed": name})
        write_pairs(folder / "evals/other/pairs.jsonl", records([2.0] * 3, first=ord(name) % 2))
        runs.append(folder)
    write_pairs(runs[0] / "evals/one-has-it/pairs.jsonl", records([2.0]))
    runs = [read_run(folder) for folder in runs]
    pairs, notes = shared_pairs(runs)
    assert {name: len(found) for name, found in pairs.items()} == {
        **{"critique": 5, "ratings": 8, "evals/other": 2}
    }
    assert len(notes) == 2
    assert notes[0].startswith("evals/one-has-it: only 1 of 2 runs")
    assert notes[1].startswith("evals/other: 2 of 3 pairs are shared")
    scores = scores_of(pairs, arms_of(runs), seed=0)
    assert {(s.arm, s.labeling): s.accuracy for s in scores} == {
        **{("a", "critique"): 1.0, ("a", "ratings"): 0.0, ("a", "evals/other"): 1.0},
        **{("b", "critique"): 0.0, ("b", "ratings"): 1.0, ("b", "evals/other"): 1.0},
    }


def test_seeds_are_pooled_pair_by_pair(tmp_path):
    """Two seeds of two rules: pair 0 is right in 1 of 2 runs and 2 of 2, pair 1 in 0 and 1."""
    right = {("mean-rating", 1): (1, 0, 1), ("mean-rating", 2): (0, 0, 1)}
    right |= {("rating", 1): (1, 1, 1), ("rating", 2): (1, 0, 1)}
    runs = []
    for (rule, seed), values in right.items():
        train = [{"path": "a.jsonl", "curation": {"rule": rule}}]
        rows = records([float(2 * value - 1) for value in values])
        folder = tmp_path / f"{rule}-{seed}"
        write_run(folder, rows, train={"seed": seed}, data={"train": train})
        runs.append(read_run(folder))
    assert differing(runs) == ["data.train.0.curation.rule", "train.seed"]
    arms = arms_of(runs)
    assert [arm.name for arm in arms] == ["rule mean-rating", "rule rating"]
    assert [len(arm.runs) for arm in arms] == [2, 2]
    pairs, _ = shared_pairs(runs)
    first, second = scores_of(pairs, arms, seed=0)
    assert first.accuracy == pytest.approx(1.5 / 3) and first.seeds == pytest.approx([2 / 3, 1 / 3])
    assert second.accuracy == pytest.approx(2.5 / 3)
    every = next(differences_of(pairs, arms, seed=0))
    assert every.values[0] == pytest.approx(1 / 3) and every.values[2] == pytest.approx(2 / 3)
    assert (every.first_more, every.arm_more, every.p) == (0, 2, 0.5)
    assert [arm.name for arm in arms_of(runs[:2])] == ["mean-rating-1", "mean-rating-2"]


def test_equal_pairs_and_sources_keep_apart(tmp_path):
    """Two pairs with the same tokens are two; the sources are two groups."""
    rows = records([1.0, 2.0]) + records([-1.0], source="books")
    runs = [write_run(tmp_path / name, rows, train={"seed": name}) for name in "ab"]
    runs = [read_run(run) for run in runs]
    pairs, notes = shared_pairs(runs)
    assert len(pairs["held out"]) == 3 and not notes
    found = differences_of(pairs, arms_of(runs), seed=0)
    assert [(d.name, d.pairs) for d in found if d.kind == "source"] == [("books", 1), ("web", 2)]


def test_a_figure_is_drawn_and_nothing_is_overwritten(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [
        write_run(tmp_path / f"{beta}-{seed}", records([beta, -1.0, 1.0]), train={"seed": seed})
        for beta, seed in ((0.1, 1), (0.5, 2))
    ]
    figure = tmp_path / "new/figure.png"
    code, out, _ = compare(capsys, *runs, "--figure", figure)
    assert code == 0 and figure.read_bytes()[:4] == b"\x89PNG" and f"wrote {figure}" in out
    code, _, err = compare(capsys, *runs, "--figure", figure)
    assert code == 2 and "exists already" in err


def test_mistakes_name_the_file(tmp_path, capsys):
    sound = write_run(tmp_path / "sound", records([1.0, -1.0]))
    other = write_run(tmp_path / "other", records([1.0, -1.0], first=7), train={"seed": 2})
    bare = write_run(tmp_path / "bare", [])
    for arguments, message in [
        ((sound, other), "the runs share no held-out pair"),
        ((sound, bare), "bare: holds no eval_pairs.jsonl"),
        ((sound, tmp_path / "none"), "metrics.jsonl: no such file"),
        ((sound, other, "--to", "notus-7b-v1"), "--to and --pairs: for one run, found 2"),
        ((sound, "--figure", tmp_path / "a.png"), "--figure: for several runs"),
    ]:
        code, out, err = compare(capsys, *arguments)
        assert (code, out) == (2, "") and message in err
    for key, value, message in [
        ("sha256", None, 'eval_pairs.jsonl:1: no "sha256", so an earlier version wrote it'),
        ("right", 1, "right is 1; expected bool"),
        ("right", None, "right is None; expected bool"),
        ("source", 3, "source is 3; expected str"),
        ("loss", None, "loss is null; expected a finite number"),
        ("margin", True, "margin is true; expected a finite number"),
        ("margin", math.nan, "margin is NaN; expected a finite number"),
        ("chosen_tokens", 10**400, "chosen_tokens is 1000000000"),
    ]:
        (row,) = records([1.0])
        row = row | {key: value}
        if key == "sha256":
            del row[key]
        write_pairs(bare / "eval_pairs.jsonl", [row])
        with pytest.raises(UserError, match=message):
            read_run(bare)
