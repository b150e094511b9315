"""The model card: parsed by the hub's own parser, its numbers those of metrics.jsonl."""

import itertools
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from torch.utils.tensorboard import SummaryWriter

import eval as evaluation_commands
import train
from notus.card import card
from notus.card.card import read_record, write_card
from notus.card.curves import full_lines, points, running_mean
from notus.errors import UserError
from notus.generate.prompts import Prompt
from notus.generate.samples import record_samples


def short_run(demo: Path, folder: Path, **keys: object) -> Path:
    """Train for a few steps with nine pairs held out; the run's folder."""
    source = {"path": str(demo / "preferences.jsonl"), "curation": {"rule": "mean-rating"}}
    config = {
        "model": {"policy": str(demo / "sft"), "compute_dtype": "float32"},
        "data": {
            "train": [source],
            "eval": {"holdout": 9},
            "max_length": 96,
            "max_prompt_length": 48,
            "tokens_per_microbatch": 512,
        },
        "optimizer": {"learning_rate": 1e-3},
        "train": {"pairs_per_step": 24, "epochs": 2, **keys},
        "parallel": {"device": "cpu", "activation_checkpointing": "none"},
        "evaluation": {"every": 2},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert train.main([str(folder / "config.json")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """Four steps of train.py, evaluated at 0, 2 and 4, and the card that it wrote by itself."""
    torch.set_num_threads(1)
    return short_run(demo, tmp_path_factory.mktemp("card"), max_steps=4)


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of that run to spoil; its cards are written without figures, which take a while."""
    monkeypatch.setattr(card, "find_spec", lambda name: None)
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_start(run: Path, **changes) -> None:
    """Change what the first event of history.jsonl says."""
    path = run / "history.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changes), *rest]) + "\n")


def text_of(run: Path, **facts: object) -> str:
    return write_card(run, **facts).read_text()


def table_rows(text: str) -> dict[str, list[str]]:
    """Rows of all Markdown tables, by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first.strip("`"): rest for first, *rest in rows}


def test_the_card_that_training_writes(finished):
    text = (finished / "final/README.md").read_text()
    parsed = ModelCard(text)
    data = parsed.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "dpo" in data["tags"] and data["license"] == "unknown"
    # Policy and data are local: the hub would refuse their paths.
    assert "base_model" not in data and "datasets" not in data
    last = lines_of(finished)[-1]
    results = {result.metric_name: result.metric_value for result in parsed.data.eval_results}
    meaningful = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    assert results == {name: last[name] for name in meaningful}
    assert metadata_load(finished / "final/README.md") == data
    assert parsed.data.model_name == "run"


def test_tables_show_the_numbers_of_the_log(finished):
    text = (finished / "final/README.md").read_text()
    first, *_, last = (line for line in lines_of(finished) if "eval_loss" in line)
    rows = table_rows(text)
    for name, value in last.items():
        if name.startswith("eval_"):
            assert rows[name] == [f"{first[name]:.4f}", f"{value:.4f}"]
    record = read_record(finished)
    assert f"{record.count('train')}pairs: 4 steps, {lines_of(finished)[-1]['epoch']:g} ep" in text
    assert rows["torch"] == [version("torch")] and rows["processes"][0].startswith("1 x CPU")
    state = json.loads(next(finished.glob("checkpoints/*/state.json")).read_text())
    assert f"tokens: `{state['common']['tokens_sha256']}`" in text
    assert f"weights: `{state['reference']['sha256']}`" in text
    assert f"- train: {state['pairs']} pairs" in text and "- eval: 9 pairs" in text
    assert "Means over 9 held-out pairs" in text
    shown = text.split("```json\n")[1].split("\n```")[0]
    settings = json.loads((finished / "config.json").read_text())
    settings["model"]["policy"] = "sft"
    settings["data"]["train"][0]["path"] = "preferences.jsonl"
    settings["output_dir"] = "run"
    assert json.loads(shown) == settings


def test_the_code_that_uses_the_model_runs(finished, monkeypatch, capsys):
    text = (finished / "final/README.md").read_text()
    monkeypatch.chdir(finished)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()


def test_the_figure_holds_six_panels(finished):
    image = pytest.importorskip("matplotlib.image")
    text = (finished / "final/README.md").read_text()
    assert [path.name for path in (finished / "final/figures").iterdir()] == ["curves.png"]
    assert text.count("![") == 1 and "(figures/curves.png)" in text
    pixels = (image.imread(finished / "final/figures/curves.png")[..., :3] * 255).round()
    height, width, _ = pixels.shape
    blue, orange = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in ("#0072B2", "#D55E00"))
    for row, column in itertools.product(range(2), range(3)):
        panel = pixels[row * height // 2 :, column * width // 3 :]
        panel = panel[: height // 2, : width // 3]
        assert (panel == blue).all(-1).any()
        # Rewards and log-ratios have two metrics.
        assert bool((panel == orange).all(-1).any()) == ((row, column) in ((1, 0), (1, 1)))


def test_a_partial_step_is_no_cliff():
    lines = [{"step": n, "pairs": held} for n, held in ((1, 32), (2, 3), (3, 32), (4, 16))]
    assert [line["step"] for line in full_lines(lines)] == [1, 3, 4]
    older = [{"step": n} for n in (1, 2)]  # logged before there was `pairs`
    assert full_lines(older) == older


def test_samples_are_the_last_ones(run):
    assert "## Samples" not in text_of(run)
    prompts = [Prompt(f"ask {n}", f"ask {n}") for n in range(5)]
    for step in (2, 4):
        columns = [[f"{who} {n}, step {step} | ## x" for n in range(5)] for who in "ab"]
        record_samples(run, SummaryWriter(run / "board"), step, prompts, *columns)
    settings = json.loads((run / "config.json").read_text())
    settings["evaluation"]["samples"] = {"max_new_tokens": 7, "temperature": 0.5}
    edit(run / "config.json", evaluation=settings["evaluation"])
    found = text_of(run).split("## Samples\n")[1].split("\n## ")[0]
    assert "after 4 steps: sampled at temperature 0.5, 7 tokens at most" in found
    assert re.findall(r"\*\*\d\.\*\* ask \d", found) == [f"**{n + 1}.** ask {n}" for n in range(3)]
    assert "b 2, step 4 \\| \\#\\# x" in found and "step 2" not in found


def test_without_matplotlib_the_card_says_what_draws_the_curves(run):
    text = text_of(run)
    assert "figures/" not in text and not (run / "final/figures").exists()
    assert "pip install -e '.[report]'" in text


def test_an_accuracy_of_ties_is_no_point():
    lines = [{"step": n, "rewards/accuracies": n / 4, "rewards/margins": n / 2} for n in range(3)]
    assert points(lines, "rewards/accuracies").tolist() == [[1, 2], [0.25, 0.5]]
    held_out = [{f"eval_{name}": value for name, value in line.items()} for line in lines]
    held_out = [line | {"step": n} for n, line in enumerate(held_out)]
    assert points(held_out, "eval_rewards/accuracies").tolist() == [[1, 2], [0.25, 0.5]]
    assert points(lines, "rewards/margins").tolist() == [[0, 1, 2], [0, 0.5, 1]]
    alone = [{"step": 0, "rewards/accuracies": 0.5}]  # a log without margins
    assert points(alone, "rewards/accuracies").tolist() == [[0], [0.5]]


def test_running_mean_by_hand():
    values = np.array([0.0, 0.0, 6.0, 0.0, 3.0])
    assert running_mean(values, 0).tolist() == values.tolist()
    assert running_mean(values, 1).tolist() == [0, 2, 2, 3, 1.5]
    assert running_mean(values, 9).tolist() == [1.8] * 5


def test_hub_ids_stand_in_the_front_matter(run):
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["policy"] = "alignment-handbook/zephyr-7b-sft-full"
    settings["data"]["train"][0] |= {"path": "org/set", "split": "train_prefs"}
    edit(run / "config.json", **settings)
    edit_start(run, local=[])
    data = ModelCard(text_of(run)).data
    assert data.base_model == "alignment-handbook/zephyr-7b-sft-full"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.datasets == ["org/set"]
    assert {(r.dataset_type, r.dataset_split) for r in data.eval_results} == {
        ("org/set", "train_prefs")
    }
    edit_start(run, local=["alignment-handbook/zephyr-7b-sft-full", "org/set"])
    named = ModelCard(text_of(run, license="mit", base_model="org/base", datasets=["org/raw"])).data
    assert (named.license, named.base_model, named.datasets) == ("mit", "org/base", ["org/raw"])


def test_adapters_are_tagged_as_such(run):
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["lora"] = {"rank": 4, "alpha": 8.0, "merge": False}
    edit(run / "config.json", **settings)
    text = text_of(run, base_model="org/base")
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft" and "lora" in data["tags"]
    assert data["base_model_relation"] == "adapter" and "Low-rank adapters for [org/base]" in text
    assert 'path = "final/adapter"' in text
    settings["model"]["lora"]["merge"] = True
    edit(run / "config.json", **settings)
    assert ModelCard(text_of(run)).data.library_name == "transformers"


def test_fine_tuning_has_loss_and_perplexity(demo, tmp_path):
    output = short_run(demo, tmp_path, objective="sft", max_steps=2)
    text = (output / "final/README.md").read_text()
    data = ModelCard(text).data
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results.keys() == {"eval_loss", "eval_perplexity"}
    assert "sft" in data.tags and "supervised fine-tuning" in text and "reward" not in text


def test_hours_of_a_run_that_was_killed_once(run):
    events = [
        {"event": "start", "time": "2026-01-01T00:00:00+00:00", "ranks": 8},
        {"event": "start", "time": "2026-01-01T05:00:00+00:00", "ranks": 4},
        {"event": "end", "time": "2026-01-01T06:30:00+00:00"},
    ]
    (start, *_) = (json.loads(line) for line in (run / "history.jsonl").read_text().splitlines())
    start["device"] = "NVIDIA H200"
    text = "".join(json.dumps(start | event) + "\n" for event in events)
    (run / "history.jsonl").write_text(text)
    rows = table_rows(text_of(run))
    assert rows["hours"] == ["1.50, without 1 that were killed"]
    assert rows["processes"] == ["4 x NVIDIA H200"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.py", "train.py"),
        ("/home/anna/notus/train.py", "train.py"),
        ("../anna/c.json", "c.json"),
        ("configs/notus.json", "configs/notus.json"),
        ("{here}/configs/notus.json", "configs/notus.json"),
        ("--resume=/home/anna/step-5", "--resume=step-5"),
        ("model.policy=org/name", "model.policy=org/name"),
        ("model.policy=/home/anna/my sft", "model.policy=my sft"),
        ("data.train.0.path=../anna/p.jsonl", "data.train.0.path=p.jsonl"),
        ('data.train=[{"path": "/home/anna/p.jsonl"}]', 'data.train=[{"path": "p.jsonl"}]'),
        (
            'data.train.0.curation={"decontaminate":["/home/anna/t.jsonl", "m.jsonl"]}',
            'data.train.0.curation={"decontaminate":["t.jsonl", "m.jsonl"]}',
        ),
        ("loss.beta=0.10", "loss.beta=0.10"),
        ("/home/anna/a=b/c.json", "c.json"),
    ],
)
def test_words_of_a_command_have_no_absolute_path(word, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert card.shown_text(word.format(here=Path.cwd()) if "{here}" in word else word) == told


def test_below_the_root_a_path_is_its_last_part(monkeypatch):
    monkeypatch.chdir("/")
    assert card.shown_text("/home/anna/c.json") == "c.json"


def test_no_path_of_the_machine_is_published(run, tmp_path):
    """Every path that a run can be given, as an absolute one, and the run's own."""
    home = "/home/anna"
    folder = tmp_path / "pairs"
    folder.mkdir()
    manifest = {
        "input": f"{home}/UltraFeedback",
        "decontaminate": [f"{home}/truthful_qa.jsonl"],
        "drop_sources": [],
        "counts": {"rows": 2, "pairs": 1, "dropped": {}},
        "rows_sha256": {f"{home}/UltraFeedback": "abc"},
        "files_sha256": {"train.parquet": "def"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    settings = json.loads((run / "config.json").read_text())
    settings["model"] |= {"policy": f"{home}/sft", "reference": f"{home}/other", "lora": {}}
    settings["model"]["lora"] = {"rank": 4, "alpha": 8.0, "merge": False}
    screened = settings["data"]["train"][0]["curation"] | {"decontaminate": [f"{home}/mt.jsonl"]}
    sources = [{"path": f"{home}/pairs.jsonl", "curation": screened}, {"path": str(folder)}]
    plain = {"split": None, "weight": 1.0, "format": None, "curation": None}
    settings["data"] |= {
        "train": [plain | source for source in sources],
        "eval": [plain | {"path": f"{home}/held-out.jsonl"}],
    }
    settings["evaluation"]["samples"] = {"prompts": f"{home}/prompts.jsonl", "count": 1}
    settings["output_dir"] = f"{home}/run"
    edit(run / "config.json", **settings)
    command = ["python", f"{home}/train.py", f"{home}/c.json", f"model.policy={home}/sft"]
    edit_start(run, command=command, local=[f"{home}/{name}" for name in ("sft", "other")])
    (run / "evals").mkdir()
    scores = {"model": f"{home}/final", "win_rate": 50.0, "standard_error": 1.0, "total": 2}
    found = {
        "evaluator": "alpaca_eval",
        "baseline": f"{home}/baseline.json",
        "measured": [scores | {"average_length": 3}],
        "published": [],
        "notes": [],
    }
    (run / "evals/a.json").write_text(json.dumps(found))
    text = text_of(run)
    assert "anna" not in text and str(tmp_path) not in text
    assert not re.findall(r"(?<![\w:/.)<])/\w+", text.replace("https://", ""))
    assert "python train.py c.json model.policy=sft" in text
    for name in ("sft", "other", "pairs", "mt.jsonl", "truthful_qa.jsonl", "prompts.jsonl"):
        assert name in text


@pytest.mark.parametrize("option", ["--base-model", "--datasets"])
def test_hub_ids_are_no_paths(run, capsys, option):
    with pytest.raises(SystemExit):
        card.main([str(run), option, "/home/anna/sft"])
    assert f"{option}: invalid hub_id value: '/home/anna/sft'" in capsys.readouterr().err


def test_curated_data_bring_their_manifest(run, tmp_path):
    folder = tmp_path / "curated"
    folder.mkdir()
    manifest = {
        "input": "openbmb/UltraFeedback",
        "decontaminate": ["truthful_qa.jsonl"],
        "drop_sources": [],
        "counts": {"rows": 1234, "pairs": 1000, "dropped": {"tied ratings": 234}},
        "rows_sha256": {"openbmb/UltraFeedback": "abc"},
        "files_sha256": {"train.parquet": "def"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["train"][0]["path"] = str(folder)
    edit(run / "config.json", **settings)
    text = text_of(run)
    shown = text.split("Curated from openbmb/UltraFeedback by")[1].split("```json\n")[1]
    assert json.loads(shown.split("\n```")[0]) == manifest


def test_results_of_evaluators_are_shown_with_the_published_ones(run, tmp_path):
    preferences = [2.0, 1.0, 2.0, 1.5]
    rows = [
        {
            "instruction": f"{i}",
            "generator_1": "text_davinci_003",
            "output_1": "a",
            "generator_2": "mine",
            "output_2": "four",
            "preference": value,
        }
        for i, value in enumerate(preferences)
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    (run / "evals").mkdir()
    command = ["score", "alpaca_eval", str(tmp_path / "annotations.json")]
    assert evaluation_commands.main([*command, "--json", str(run / "evals/alpaca_eval.json")]) == 0
    found = table_rows(text_of(run))
    assert found["mine"][0] == "62.50" and found["mine"][2:] == ["4", "4"]
    assert found["notus-7b-v1 (published)"] == ["91.42", "0.99", "804", "2,139"]


def test_what_a_card_cannot_be_made_of(run, tmp_path, capsys):
    assert card.main([str(tmp_path / "nothing")]) == 2
    assert "nothing/metrics.jsonl: no such file; expected the output_dir" in capsys.readouterr().err
    evaluations = [line for line in lines_of(run) if line["step"] == 0]
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    with pytest.raises(UserError, match="metrics.jsonl: no training step is logged there"):
        write_card(run)
    (run / "metrics.jsonl").write_text(whole)
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match="final: no such folder; train.py writes it"):
        write_card(run)


def test_a_torn_line_of_metrics_is_skipped(run):
    whole = text_of(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "loss": 0.\xff')
    assert text_of(run) == whole
