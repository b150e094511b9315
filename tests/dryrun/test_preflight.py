import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import train
from benchmarks.memory import MISTRAL_7B
from notus.config import load_config
from notus.dryrun.report import attention_text, size_text
from notus.engine.flops import GPUS
from notus.errors import UserError
from notus.model import hub
from notus.model.weights import open_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(demo, tmp_path, monkeypatch):
    """A working directory with the demo's data, and Mistral-7B's config.json and no weights."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo / "sft", "policy", ignore=shutil.ignore_patterns("*.safetensors"))
    about = json.loads(Path("policy/config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    heads = ("num_attention_heads", "num_key_value_heads")
    about |= {name: getattr(MISTRAL_7B, name) for name in (*sizes, *heads)}
    Path("policy/config.json").write_text(json.dumps(about))
    return [
        str(ROOT / "configs/notus.json"),
        "model.policy=policy",
        f"data.train.0.path={demo / 'preferences.jsonl'}",
        "data.train.0.split=null",
        'data.train.0.curation={"rule":"mean-rating"}',
        "data.eval.holdout=5",
        "train.pairs_per_step=8",
        "--dry-run",
    ]


def test_the_published_recipe_without_gpu_weights_or_network(place, demo, capfd):
    assert train.main([*place, "--gpus", "8", "--gpu", "a100-40gb", "--price", "2.5"]) == 0
    said = capfd.readouterr().out
    for words in (
        "memory of one rank, on 8 x a100-40gb",
        "  FITS on 8 x a100-40gb: the limit is 35.9 GiB (95% of 39.4 GiB, less 1.5 GiB for CUDA, ",
        "at 2.5 per GPU-hour",
        "assumed: 45%",
        f"look at the rows\n  python -m notus.look {shlex.quote(str(demo / 'preferences.jsonl'))} ",
    ):
        assert words in said, said
    lines = {line[:56].strip(): line[56:].strip() for line in said.splitlines()}
    assert [lines[name] for name in ("parameters", "rmsprop state")] == ["3.4 GiB", "3.4 GiB"]
    assert not Path("runs").exists()


def test_what_was_chosen_and_what_would_be_faster(place, capfd, narrow):
    """Eight short pairs on eight GPUs are one row each: a larger budget saves none."""
    narrow(80)
    assert train.main([*place, "--gpus", "8", "--gpu", "a100-40gb"]) == 0
    report = capfd.readouterr().out.partition("\nplan\n")[2]
    assert max(map(len, report.splitlines())) <= 80
    said = " ".join(report.split())
    assert "parallel.keep_gathered: on, because rows of the full budget fit" in said
    mode = (
        r"activation_checkpointing: full; to recompute less, selective [\d.]+ GiB \(fits\), none "
    )
    assert re.search(mode, said), said
    assert "tokens_per_microbatch: 8,192; with 16,384, no fewer microbatches" in said
    assert (
        "parallel.attention: flex, because it adds in a fixed order; backward tiles 64 64 64 64, "
        "2 stages, 8 warps, which spill few registers"
    ) in said


@pytest.mark.parametrize(
    ("overrides", "width", "words"),
    [
        (
            ["model.compute_dtype=float32"],
            128,
            "flex, because it adds in a fixed order; PyTorch's ",
        ),
        (
            ["parallel.attention=flex"],
            64,
            "flex, as configured; PyTorch's tiles, because its heads",
        ),
        ([], 8, "dense, because flex needs heads of 16 or more"),
        (["parallel.attention=varlen"], 128, "varlen, as configured"),
    ],
)
def test_attention_and_why(overrides, width, words):
    config = load_config(ROOT / "configs/notus.json", overrides)
    found = attention_text(config, replace(MISTRAL_7B, head_dim=width))
    assert found.startswith(f"  parallel.attention: {words}")
    assert (";" in found) == (";" in words)


def test_a_larger_budget_that_saves_microbatches(place, capfd):
    rows = ["data.max_length=256", "data.max_prompt_length=128", "data.tokens_per_microbatch=256"]
    assert train.main([*place, *rows, "--gpus", "1", "--gpu", "h200"]) == 0
    found = re.search(
        r"256; with 512, (\d+)% fewer microbatches, [\d.]+ GiB \(fits\)", capfd.readouterr().out
    )
    assert 0 < int(found[1]) <= 50


def test_another_run_in_the_output_dir_is_shown_and_refused(place, capfd):
    """The plan and the memory all the same, then the reason, as a verdict."""
    Path("runs/notus-7b-v1").mkdir(parents=True)
    Path("runs/notus-7b-v1/notes.txt").write_text("mine")
    assert train.main([*place, "--gpus", "8", "--gpu", "a100-40gb"]) == 1
    said, refused = capfd.readouterr().out.split("WOULD NOT START: ")
    assert "FITS on 8 x a100-40gb" in said and "plan\n" in said
    assert refused.startswith("output_dir: runs/notus-7b-v1 is not empty and holds no run")


def test_what_does_not_fit_says_what_would(place, capfd):
    """108 GiB of weights, gradients and state; the host's memory or four GPUs hold them."""
    assert train.main([*place, "--gpu", "a100-40gb", "optimizer.name=adamw"]) == 1
    said = capfd.readouterr().out
    assert "DOES NOT FIT on 1 x a100-40gb: the limit is" in said
    _, *changes = said.partition("the usual changes")[2].partition("\n\n")[0].splitlines()
    shown = [re.fullmatch(r"    (\S.*\S) +[\d.]+ GiB(  fits)?", line).groups() for line in changes]
    assert [(words.strip(), bool(fits)) for words, fits in shown] == [
        ("data.tokens_per_microbatch=4096", False),
        ("optimizer.state_dtype=bfloat16", False),
        ("parallel.cpu_offload=true", True),
        ("--gpus 4", True),
    ]


def test_nothing_helps(place, capfd):
    """No number of GPUs makes a row of 16 million slots smaller."""
    rows = ["data.max_length=16000000", "data.tokens_per_microbatch=16000000"]
    assert train.main([*place, *rows, "--gpu", "rtx-3090"]) == 1
    assert "none of them makes it fit, nor do up to 256 GPUs" in capfd.readouterr().out


def test_on_the_cpu_there_is_no_verdict(place, demo, capfd):
    """Only the memory is shown; a GPU contradicts parallel.device."""
    on_cpu = [*place, "parallel.device=cpu"]
    assert train.main(on_cpu) == 0
    said = capfd.readouterr().out
    assert "memory of one rank, on 1 x CPU" in said and "peak" in said
    assert "GPUs" not in said and "FITS" not in said
    assert train.main([*on_cpu, "--gpu", "h100"]) == 2
    assert '--gpu h100: parallel.device is "cpu"' in capfd.readouterr().err


def test_every_known_gpu_without_one_named(place, capfd):
    assert train.main(place) == 0
    table = capfd.readouterr().out.partition("known GPUs")[2]
    rows = {line.split()[0]: line.split()[3:5] for line in table.splitlines()[2:-1]}
    assert rows.keys() == {gpu.name for gpu in GPUS}
    assert rows["h200"] == ["yes", "1"] and rows["h100"] == ["no", "2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--gpu v100", ("--gpu v100: no such GPU is known", "a100-40gb", "h200")),
        ("--gpus 0", ("--gpus 0: expected at least 1",)),
        ("--price -1 --gpu h100", ("--price -1:",)),
        ("--price 2.5", ("--price 2.5:", "with --gpu")),
        ("--gpu h100 data.tokens_per_microbatch=8200", ("8200, expected a multiple of 128",)),
        ("--gpus 8 parallel.replicate=3", ("parallel.replicate (3)", "--gpus is 8")),
    ],
)
def test_options_that_cannot_be(place, capfd, options, words):
    assert train.main([*place, *options.split()]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


def test_weights_are_checked_where_there_are_some(place, demo):
    """Those of the demo do not have Mistral-7B's shapes."""
    shutil.copy(demo / "sft/model.safetensors", "policy")
    with pytest.raises(UserError, match="tensor .*: found .*, expected .* by config.json"):
        open_model("policy", weights=False)


def test_nothing_large_is_downloaded(place, monkeypatch):
    """Of a model on the hub, only config.json and the tokenizer."""
    asked = {}

    def download(path: str, allow_patterns: list[str]) -> str:
        asked[path] = allow_patterns
        return "policy"

    monkeypatch.setattr(hub, "snapshot_download", download)
    folder, shape = open_model("some/model", weights=False)
    assert (folder, shape.num_hidden_layers) == (Path("policy"), 32)
    assert "config.json" in asked["some/model"] and "tokenizer.json" in asked["some/model"]
    assert not any("safetensors" in pattern for pattern in asked["some/model"])


def test_planning_options_need_the_dry_run(place, capfd):
    with pytest.raises(SystemExit) as stopped:
        train.main([*place[:-1], "--gpus", "8"])
    assert stopped.value.code == 2
    assert "need --dry-run" in capfd.readouterr().err


@pytest.mark.parametrize("gpus", [8, 9, 10**9])
def test_more_gpus_than_pairs_in_a_step(place, capfd, gpus):
    assert train.main([*place, "--gpus", str(gpus), "--gpu", "a100-40gb"]) == 0
    said = capfd.readouterr().out
    warning = f"a step has 8 pairs, so at least {gpus - 8:,} of {gpus:,} ranks idle in every step"
    assert (warning in said) == (gpus > 8), said


def test_fine_tuning_has_responses_and_no_pairs(place, capfd):
    """Nor of a reference, which it has not, nor of prompts that two responses share."""
    fine_tuning = [str(ROOT / "configs/sft.json"), *place[1:]]
    assert train.main([*fine_tuning, "--gpus", "16", "--gpu", "h100"]) == 0
    said = capfd.readouterr().out.replace("train.pairs_per_step", "the key")
    kept = re.search(r"train data: (\d+) responses", said)[1]
    assert f"  responses    {kept} to train on, 5 held out" in said
    assert "steps of 8" not in said and " of 8 responses;" in said
    assert "a step has 8 responses, so at least 8 of 16 ranks idle" in said
    assert re.search(r"\n  tokens       [\d,]+; \d", said)
    assert "zeros that stand for a reference" in said
    for word in ("pair", "rejected", "reference log-probs", "saved", "prefix"):
        assert word not in said, (word, said)


def test_a_loss_without_reference(place, capfd):
    settings = ["loss.name=simpo", "loss.gamma=0.5", "reference.log_probs=none"]
    assert train.main([*place, *settings, "--gpus", "8", "--gpu", "a100-40gb"]) == 0
    said = capfd.readouterr().out
    assert "fewer by prefix sharing" in said and "zeros that stand for a reference" in said
    assert "reference log-probs" not in said and "the reference's" not in said
    assert not re.search(r"FLOP:.*reference", said)


def test_the_reference_of_adapters_is_their_base(place, capfd):
    """There is no second model, online or not."""
    adapters = [*place, 'model.lora={"rank":8,"alpha":8}', "--gpu", "h100"]
    for log_probs in ("cached", "online"):
        assert train.main([*adapters, f"reference.log_probs={log_probs}"]) == 0
        said = capfd.readouterr().out
        assert "  FITS on 1 x h100" in said and "reference model" not in said
        assert ("reference log-probs (float32)" in said) == (log_probs == "cached")


def adapter_of(base: str, folder: Path) -> None:
    """A rank-2 adapter of all queries in PEFT's format."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": base})
    )
    tensors = {}
    for layer in range(32):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.zeros(2, 4096)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(4096, 2)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_adapter_as_the_policy(place, capfd):
    """It is merged into its base, which is the reference only if no other model is named."""
    adapter_of("policy", Path("adapter"))
    merged = [*place, "model.policy=adapter", "reference.log_probs=online", "--gpu", "h200"]
    assert train.main([*merged, 'model.lora={"rank":8,"alpha":8}']) == 0
    assert "reference model" not in capfd.readouterr().out
    other = [*merged, "model.reference=policy", 'model.lora={"rank":8,"alpha":8}']
    assert train.main(other) == 0
    assert re.search(r"reference model +13.5 GiB", capfd.readouterr().out)
    assert train.main(merged) == 0
    assert re.search(r"reference model +13.5 GiB", capfd.readouterr().out)


@pytest.mark.parametrize(
    ("size", "text"), [(512, "0.5 KiB"), (300_000, "0.3 MiB"), (2**30 // 5, "0.2 GiB")]
)
def test_sizes_have_units_of_their_size(size, text):
    assert size_text(size) == text


def test_short_runs_have_no_hours(place, capfd):
    """A step of few pairs on 256 GPUs: seconds."""
    assert train.main([*place, "train.max_steps=1", "--gpus", "256", "--gpu", "b200"]) == 0
    said = capfd.readouterr().out
    assert "less than a minute of computing" in said and "about < 0.01 hours" not in said
