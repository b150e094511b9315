"""The model card: parsed by the hub's own parser, its numbers those of metrics.jsonl."""

import json
import re
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, metadata_load
from torch.utils.tensorboard import SummaryWriter

import eval as evaluation_commands
import train
from notus.card import card
from notus.card.card import Identity, read_record, run_hours, write_card
from notus.card.curves import running_mean
from notus.errors import UserError
from notus.evals.published import DPO_RUNS

ROOT = Path(__file__).parents[2]


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


def text_of(run: Path, identity: Identity = card.UNKNOWN) -> str:
    return write_card(run, identity).read_text()


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
    assert results == {name: value for name, value in last.items() if name.startswith("eval_")}
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= results.keys()
    assert metadata_load(finished / "final/README.md") == data
    assert parsed.data.model_name == "run"


def test_a_run_that_was_killed_before_its_card_says_how_to_write_it(finished, capsys):
    missing = f"python -m notus.card {finished} writes it"
    again = [str(finished.parent / "config.json")]
    assert train.main(again) == 0
    said = capsys.readouterr().out
    assert "nothing left to do" in said and missing not in said
    written = finished / "final/README.md"
    text = written.read_text()
    written.unlink()
    try:
        assert train.main(again) == 0
        assert missing in capsys.readouterr().out
    finally:
        written.write_text(text)


def test_tables_show_the_numbers_of_the_log(finished):
    text = (finished / "final/README.md").read_text()
    first, *_, last = (line for line in lines_of(finished) if "eval_loss" in line)
    rows = table_rows(text)
    for name, value in last.items():
        if name.startswith("eval_"):
            assert rows[name] == [f"{first[name]:.4f}", f"{value:.4f}"]
    record = read_record(finished)
    assert rows["steps"] == ["4"] and rows["pairs per step"] == ["24"]
    assert rows["epochs"] == [f"{lines_of(finished)[-1]['epoch']:g}"]
    assert rows["torch"] == [version("torch")] and rows["processes"][0].startswith("1 x CPU")
    state = json.loads(next(finished.glob("checkpoints/*/state.json")).read_text())
    assert f"tokens: `{state['common']['tokens_sha256']}`" in text
    assert f"weights: `{state['reference']['sha256']}`" in text
    assert f"- train: {state['pairs']} pairs" in text and "- eval: 9 pairs" in text
    assert record.held_out_pairs == 9 and "Means over 9 held-out pairs" in text
    shown = text.split("```json\n")[1].split("\n```")[0]
    settings = json.loads((finished / "config.json").read_text())
    settings["model"]["policy"] = "sft"
    settings["data"]["train"][0]["path"] = "preferences.jsonl"
    settings["output_dir"] = "run"
    assert json.loads(shown) == settings


def test_figures_hold_the_curves(finished):
    image = pytest.importorskip("matplotlib.image")
    text = (finished / "final/README.md").read_text()
    names = {"loss", "rewards", "accuracy", "margin", "displacement", "falling"}
    assert {path.stem for path in (finished / "final/figures").iterdir()} == names
    blue, orange = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in ("#0072B2", "#D55E00"))
    for name in names:
        assert f"![{name}](figures/{name}.png)" in text
        pixels = (image.imread(finished / f"final/figures/{name}.png")[..., :3] * 255).round()
        assert pixels.shape == (480, 768, 3)
        has_orange = bool((pixels == orange).all(-1).any())
        assert (pixels == blue).all(-1).any()
        assert has_orange == (name in ("rewards", "displacement"))


def test_without_matplotlib_there_is_a_table(run):
    text = text_of(run)
    assert "figures/" not in text and not (run / "final/figures").exists()
    rows = table_rows(text)
    for line in lines_of(run)[1:]:
        assert rows[str(line["step"])][0] == f"{line['loss']:.4f}"
        assert f"{line['rewards/margins']:.4f}" in rows[str(line["step"])]


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
    named = ModelCard(text_of(run, Identity("mit", "org/base", ("org/raw",)))).data
    assert (named.license, named.base_model, named.datasets) == ("mit", "org/base", ["org/raw"])


def as_notus(run: Path, **loss) -> None:
    """Make the run look like the published one: its recipe, shape and evaluations."""
    published = DPO_RUNS["notus-7b-v1"]
    settings = json.loads((run / "config.json").read_text())
    notus = json.loads((ROOT / "configs/notus.json").read_text())
    for section in ("optimizer", "schedule", "train"):
        settings[section] |= notus[section]
    settings["train"]["max_steps"] = None
    settings["loss"] |= loss
    edit(run / "config.json", **settings)
    (state,) = run.glob("checkpoints/*/state.json")
    common = json.loads(state.read_text())["common"]
    common["model_shape"] |= {"hidden_size": 4096, "num_hidden_layers": 32}
    edit(state, common=common)
    lines = lines_of(run)
    lines[-1] |= {
        "eval_loss": published.end.loss,
        "eval_rewards/accuracies": published.end.accuracy,
        "eval_rewards/margins": 1.0,
    }
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_repeated_recipe_stands_beside_the_published_run(run):
    as_notus(run)
    text = text_of(run)
    cells = {
        line.split(" | ")[1]: line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith("| end | ")
    }
    assert cells["loss"] == ["end", "loss", "0.4730", "0.4730", "0.0000", "2,000"]
    assert cells["accuracy"][2:] == ["0.8016", "0.8016", "0.0000", "252"]
    # The spread of the margins is 3.8412 / Phi^-1(0.8016) = 4.5322 over 252 and 9 pairs.
    assert float(cells["margin"][4]) == pytest.approx(
        -2.8412 / (4.5322 * (1 / 252 + 1 / 9) ** 0.5), abs=1e-3
    )


def test_another_recipe_does_not(run):
    as_notus(run, beta=0.2)
    assert "notus-7b-v1" not in text_of(run)


def test_adapters_are_tagged_as_such(run):
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["lora"] = {"rank": 4, "alpha": 8.0, "merge": False}
    edit(run / "config.json", **settings)
    text = text_of(run, Identity(base_model="org/base"))
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft" and {"lora", "peft"} <= {*data["tags"]}
    assert data["base_model_relation"] == "adapter" and 'subfolder="adapter"' in text
    settings["model"]["lora"]["merge"] = True
    edit(run / "config.json", **settings)
    assert ModelCard(text_of(run)).data.library_name == "transformers"


def test_fine_tuning_has_loss_and_perplexity(demo, tmp_path):
    output = short_run(demo, tmp_path, objective="sft", max_steps=2)
    text = (output / "final/README.md").read_text()
    data = ModelCard(text).data
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results.keys() == {"eval_loss", "eval_logps/chosen", "eval_perplexity"}
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
    midnight = 1767225600  # 2026-01-01T00:00:00Z
    with SummaryWriter(str(run / "tensorboard")) as board:
        board.add_scalar("loss", 1.0, 1, walltime=midnight + 2 * 3600)
    hours = [(h, start["ranks"]) for h, start in run_hours(read_record(run))]
    assert hours == [(2.0, 8), (1.5, 4)]
    rows = table_rows(text_of(run))
    assert rows["hours"] == ["3.50 in 2 starts"] and rows["GPU-hours"] == ["22.00 of NVIDIA H200"]
    assert "cost" not in rows
    assert card.main([str(run), "--price", "2.5"]) == 0
    rows = table_rows((run / "final/README.md").read_text())
    assert rows["cost"] == ["55.00 at 2.5 per GPU-hour"]


def test_no_price_of_what_used_no_gpu(run, capsys):
    text = (run / "final/README.md").read_text()
    assert "GPU-hours |" not in text
    for price, words in (("2.5", "tells of no hours on a GPU"), ("-1", "expected the price of")):
        assert card.main([str(run), "--price", price]) == 2
        assert words in capsys.readouterr().err
    assert (run / "final/README.md").read_text() == text


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.py", "train.py"),
        ("/home/anna/notus/train.py", "train.py"),
        ("~/c.json", "c.json"),
        ("../anna/c.json", "c.json"),
        ("configs/notus.json", "configs/notus.json"),
        ("--resume=/home/anna/step-5", "--resume=step-5"),
        ("model.policy=org/name", "model.policy=org/name"),
        ("model.policy=/home/anna/sft", "model.policy=sft"),
        ("data.train.0.path=../anna/p.jsonl", "data.train.0.path=p.jsonl"),
        ('data.train=[{"path": "/home/anna/p.jsonl"}]', 'data.train=[{"path": "p.jsonl"}]'),
        (
            'data.train.0.curation={"decontaminate":["/home/anna/t.jsonl", "m.jsonl"]}',
            'data.train.0.curation={"decontaminate": ["t.jsonl", "m.jsonl"]}',
        ),
        ("data.train.0.curation.decontaminate.0=/home/anna/t", None),
        ("data.system_prompt=/think", "data.system_prompt=/think"),
        ("loss.beta=0.10", "loss.beta=0.10"),
        ("/home/anna/a=b/c.json", "c.json"),
    ],
)
def test_what_a_card_tells_of_a_command(word, told):
    told = told or "data.train.0.curation.decontaminate.0=t"
    assert card.public_word(word) == told


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
    assert not re.findall(r"(?<![\w:/.)])/\w+", text.replace("https://", ""))
    assert "python train.py c.json model.policy=sft" in text
    for name in ("sft", "other", "pairs", "mt.jsonl", "truthful_qa.jsonl", "prompts.jsonl"):
        assert name in text
    assert 'from_pretrained("sft")' in text


@pytest.mark.parametrize("option", ["--base-model", "--datasets"])
def test_hub_ids_are_no_paths(run, capsys, option):
    assert card.main([str(run), option, "/home/anna/sft"]) == 2
    assert f"{option} /home/anna/sft: expected a hub id" in capsys.readouterr().err


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
    rows = table_rows(text)
    assert rows["rows"] == ["1,234"] and rows["dropped: tied ratings"] == ["234"]
    assert rows["SHA-256 of train.parquet"] == ["def"]
    assert f"- {folder.name}: prompts of truthful_qa.jsonl were left out" in text


def test_results_of_evaluators_stand_beside_the_published_ones(run, tmp_path):
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
    (run / "metrics.jsonl").write_text(whole[:-10])
    last = len(whole.splitlines())
    with pytest.raises(UserError, match=f"metrics.jsonl:{last}: not valid JSON"):
        write_card(run)
    (run / "metrics.jsonl").write_text(whole)
    shutil.rmtree(run / "final")
    with pytest.raises(UserError, match="final: no such folder, so the run has not ended"):
        write_card(run)


# ---------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API an upload of small files meets, and what it was sent."""

    requests: list[tuple[str, object]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        home = f"http://{self.headers['Host']}/me/mine"
        if self.path.endswith("/commit/main"):
            sent = [json.loads(line) for line in body.splitlines()]
            answer = {"commitUrl": f"{home}/commit/abc", "commitOid": "a" * 40, "success": True}
        else:
            sent = json.loads(body)
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in sent.get("files", ())
            ]
            answer = {"url": home, "files": files}
        self.requests.append((self.path, sent))
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; its list of requests."""
    handler = type("OwnHub", (Hub,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(card, "HfApi", partial(HfApi, endpoint=endpoint, token="hf_test"))
    yield handler.requests
    server.shutdown()
    server.server_close()


def test_pushing_uploads_final_and_nothing_else(run, hub, capsys):
    assert card.main([str(run), "--push-to-hub", "me/mine", "--private"]) == 0
    assert '.from_pretrained("me/mine"' in (run / "final/README.md").read_text()
    created = dict(hub)["/api/repos/create"]
    assert created["name"] == "mine" and created["organization"] == "me"
    assert created.get("private", created.get("visibility")) in (True, "private")
    sent = dict(hub)["/api/models/me/mine/commit/main"]
    uploaded = {entry["value"]["path"] for entry in sent if entry["key"] == "file"}
    final = run / "final"
    assert uploaded == {str(p.relative_to(final)) for p in final.rglob("*") if p.is_file()}
    assert not any("optimizer" in name or "metrics" in name for name in uploaded)
    assert "/me/mine" in capsys.readouterr().out


def test_an_adapter_of_a_local_base_is_not_pushed(run, hub, capsys):
    adapter = run / "final/adapter/adapter_config.json"
    adapter.parent.mkdir()
    adapter.write_text(json.dumps({"base_model_name_or_path": "/home/anna/sft"}))
    assert card.main([str(run), "--push-to-hub", "me/mine"]) == 2
    assert "base_model_name_or_path is /home/anna/sft" in capsys.readouterr().err
    assert hub == []
    edit(adapter, base_model_name_or_path="org/base")
    assert card.main([str(run), "--push-to-hub", "me/mine"]) == 0


def test_nothing_is_pushed_unasked(run, hub):
    assert card.main([str(run)]) == 0
    assert hub == []
    with pytest.raises(SystemExit):
        card.main([str(run), "--private"])


def test_a_hub_that_cannot_be_reached(run, monkeypatch, capsys):
    nowhere = partial(HfApi, endpoint="http://127.0.0.1:9", token="hf_test")
    monkeypatch.setattr(card, "HfApi", nowhere)
    assert card.main([str(run), "--push-to-hub", "me/mine"]) == 2
    assert "--push-to-hub me/mine: the hub did not take it" in capsys.readouterr().err
