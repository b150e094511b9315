"""eval.py preferences against transformers, one response at a time, and its tables by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import eval as command
from notus.config import Curation, Source
from notus.data.formats import Pair
from notus.data.preferences import load_preferences
from notus.data.tokenization import tokenize_pairs
from notus.data.tokenizer import load_tokenizer
from notus.evals.accuracy import table
from ranks import call

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    """67 rows, a number that neither two nor three ranks divide."""
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    lines = (demo / "heldout.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:67]))
    return path


@pytest.fixture(scope="module")
def expected(demo, other, data):
    """(chosen, rejected) log-probs of model and reference, transformers, one text at a time."""
    source = Source(path=str(data), curation=Curation(rule="mean-rating"))
    pairs = load_preferences([source], seed=42).train  # as curation draws
    tokenizer = load_tokenizer(demo / "sft")
    tokens = tokenize_pairs(
        pairs,
        tokenizer,
        style="clean",
        truncation="pair",
        max_length=96,
        max_prompt_length=48,
        system_prompt=None,
    ).pairs
    sums = []
    for folder in (demo / "sft", other):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for i in range(len(tokens)):
            prompt, *responses = tokens.parts(i)
            for part in responses:
                ids = np.concatenate((tokens.tokens[prompt], tokens.tokens[part])).astype(np.int64)
                with torch.no_grad():
                    logits = model(torch.from_numpy(ids)[None]).logits[0].double()
                log_probs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
                sums.append(float(log_probs[prompt.stop - prompt.start - 1 :].sum()))
    return pairs, np.array(sums).reshape(2, -1, 2)


def arguments(demo, data, out, *more):
    return [
        "preferences",
        str(demo / "sft"),
        *("--data", str(data), "--rule", "mean-rating", "--out", str(out)),
        *("--max-length", "96", "--max-prompt-length", "48", "--tokens-per-microbatch", "200"),
        *("--compute-dtype", "float32", "--device", "cpu", *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_equals_a_slow_loop(ranks, demo, data, other, expected, tmp_path):
    pairs, sums = expected
    assert len(pairs) == 67
    out = tmp_path / "out"
    words = arguments(demo, data, out, "--reference", str(other), "--beta", "0.2")
    code, told = call(command.main, words, log=tmp_path / "log", ranks=ranks)
    assert code == 0, told
    records = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [record["where"] for record in records] == [pair.where for pair in pairs]
    assert [record["chosen"] for record in records] == [pair.chosen for pair in pairs]
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    found = np.array([[record[name] for name in names] for record in records])
    np.testing.assert_allclose(found[:, :2], sums[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[:, 2:], sums[1], rtol=1e-4, atol=1e-4)
    margin = (sums[0] - sums[1]) @ [1, -1]
    summary = json.loads((out / "summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["rewards/accuracies"] == (margin > 0).mean() == summary["rows"][0]["accuracy"]
    assert metrics["rewards/margins"] == pytest.approx(0.2 * margin.mean(), rel=1e-3)
    assert metrics["loss"] == pytest.approx(np.log1p(np.exp(-0.2 * margin)).mean(), rel=1e-4)
    assert summary["rows"][0]["n"] == len(pairs)
    assert "| all pairs |" in (out / "report.md").read_text()


def test_without_a_reference_log_probs_decide(demo, data, expected, tmp_path, capsys):
    assert command.main(arguments(demo, data, tmp_path / "out")) == 0
    metrics = json.loads((tmp_path / "out/summary.json").read_text())["metrics"]
    margin = expected[1][0] @ [1, -1]
    assert metrics["accuracy"] == (margin > 0).mean()
    assert metrics["margin"] == pytest.approx(margin.mean(), rel=1e-4)
    assert not any(name.startswith(("loss", "rewards")) for name in metrics)
    assert "without a reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, message",
    [
        (["--loss", "ipo"], "--loss ipo: needs --reference"),
        (["--reference", "nowhere"], "nowhere: no such model folder here"),
        (["--tokens-per-microbatch", "9"], "tokens, but tokens_per_microbatch is 9;"),
        (["--format", "hh"], "heldout.jsonl"),
    ],
)
def test_mistakes(more, message, demo, data, tmp_path, capsys):
    assert command.main(arguments(demo, data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(demo, data, tmp_path, capsys):
    assert command.main(arguments(demo, data, tmp_path)) == 2
    assert f"{tmp_path}: exists already" in capsys.readouterr().err


def test_another_vocabulary_is_refused(demo, data, tiny_folder, tmp_path, capsys):
    words = arguments(demo, data, tmp_path / "out", "--reference", str(tiny_folder))
    assert command.main(words) == 2
    assert "has a vocabulary of 61 tokens, the policy" in capsys.readouterr().err


def test_rated_rows_are_told_the_option(demo, data, tmp_path, capsys):
    words = [
        w for w in arguments(demo, data, tmp_path / "out") if w not in ("--rule", "mean-rating")
    ]
    assert command.main(words) == 2
    assert "  as options of this command: --rule mean-rating\n" in capsys.readouterr().err


def test_data_with_other_columns(demo, tmp_path, capsys):
    """A spreadsheet with the columns' names as options gives what the same pairs as messages do."""
    texts = [("Say a.", "a", "b"), ("Say b.", "b", "c")]
    rows = tmp_path / "rows.csv"
    with rows.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("Question", "Good", "Bad", "context"), *(row + ("x",) for row in texts)])
    plain = tmp_path / "rows.jsonl"
    lines = [{"question": q, "chosen": good, "rejected": bad} for q, good, bad in texts]
    plain.write_text("".join(map("{}\n".format, map(json.dumps, lines))))

    def measure(data, name, *more):
        words = arguments(demo, data, tmp_path / name, *more)
        code = command.main([word for word in words if word not in ("--rule", "mean-rating")])
        return code, capsys.readouterr()

    names = json.dumps({"prompt": "Question", "chosen": "Good", "rejected": "Bad"})
    options = ["--columns", names, "--format", "turns"]
    code, told = measure(rows, "refused", *options)
    assert code == 2 and "as options of this command: --ignore context\n" in told.err
    code, told = measure(rows, "mapped", *options, "--ignore", "context")
    assert code == 0 and "evaluation data: 2 pairs" in told.out and "train" not in told.out
    assert '"context" of 2 rows is ignored' in told.out
    code, told = measure(plain, "plain")
    assert code == 0 and "warning" not in told.out
    mapped, same = (
        json.loads((tmp_path / n / "summary.json").read_text()) for n in ("mapped", "plain")
    )
    assert mapped["metrics"] == same["metrics"]
    code, told = measure(rows, "text", *options[:2], "--ignore", "context")
    assert code == 0 and "warning: " in told.out and "2 rows are text" in told.out
    code, told = measure(rows, "odd", "--columns", "{Question}")
    assert code == 2 and "--columns: not JSON" in told.err


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    from notus.evals.preferences import figures

    lengths = np.array([[3, 90, 10], [3, 7, 7], [3, 5, 60]])
    margin = np.array([0.5, 0.1, -0.25])
    pairs = [Pair("p", "c", "r", f"a.jsonl:{i}") for i in range(3)]
    rows = table(pairs, margin, lengths)
    for name in figures(tmp_path, rows, margin, margin, -margin):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not math.isnan(rows[0].margin)
    for right in (-1, 1):  # accuracies of 0 and 1, whose intervals rounding may leave
        for n in (3, 4, 10, 31):
            margin, lengths = np.full(n, 0.5 * right), np.full((n, 3), 7)
            rows = table(pairs[:1] * n, margin, lengths)
            assert figures(tmp_path, rows, margin, margin, -margin)


def test_a_figure_never_costs_a_result(demo, data, tmp_path, capsys, monkeypatch):
    def broken(folder, *arguments):
        raise ValueError("no\nfont")

    monkeypatch.setattr("notus.evals.preferences.figures", broken)
    assert command.main(arguments(demo, data, tmp_path / "out")) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "summary.json", "pairs.jsonl"}
    assert "warning: a figure could not be drawn: no font\n" in capsys.readouterr().err
