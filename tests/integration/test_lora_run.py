"""Whole runs of train.py with adapters: one gradient, one base, exact resume, files others read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.func import functional_call

import train
from faults import no_space_for_adapters
from notus import build
from notus.config import load_config
from notus.model.lora import adapter_parameters, adapters_off
from notus.model.weights import load_weights
from ranks import run_ranks
from runs import base_config, metrics, pairs_of, pairs_of_step, run, stored

LORA = {"rank": 4, "alpha": 8, "target_modules": "all-linear"}
SCALING = 2.0
PER_STEP = 24
# AdamW that hardly adapts: its first moment is the step's gradient, and its first update, of B
# alone, is smooth in that gradient. At the start B is 0, and A has no gradient.
SMOOTH = {"learning_rate": 10.0, "betas": [0.0, 0.999], "eps": 1.0, "max_grad_norm": 1e9}
VARIANTS = {
    1: {
        "plain": [],
        "no sharing, selective checkpointing": [
            "data.prefix_sharing=false",
            "parallel.activation_checkpointing=selective",
        ],
        "online reference, full checkpointing": [
            "reference.log_probs=online",
            "parallel.activation_checkpointing=full",
        ],
        "cpu offload": ["parallel.cpu_offload=true"],
        "kept gathered, small budget": [
            "parallel.keep_gathered=true",
            "data.tokens_per_microbatch=128",
        ],
    },
    2: {
        "two ranks": [],
        "two replicas": ["parallel.replicate=2"],
        "two ranks, small budget, no sharing, full checkpointing, online reference": [
            "data.tokens_per_microbatch=128",
            "data.prefix_sharing=false",
            "parallel.activation_checkpointing=full",
            "reference.log_probs=online",
        ],
    },
}
NAMES = [name for variants in VARIANTS.values() for name in variants]
FIRST, LAST = "checkpoints/step-00000001", "checkpoints/step-00000002"


def lora_config(demo: Path, **lora: object) -> dict:
    config = base_config(demo)
    config["model"]["lora"] = LORA | lora
    config["schedule"] = {"name": "constant", "warmup_ratio": 0}
    return config


def dropout_config(demo: Path) -> dict:
    """Four steps with dropout in the adapters, which end as a merged model too."""
    config = lora_config(demo, dropout=0.1, merge=True)
    config["data"]["eval"] = {"holdout": 9}
    config["train"] |= {"pairs_per_step": 12, "max_steps": 4}
    config["checkpoint"] = {"every": 2}
    config["optimizer"]["learning_rate"] = 1e-2
    return config


def output_of(folder: Path, name: str) -> Path:
    return folder / name.replace(",", "").replace(" ", "-")


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """Two steps of every variant."""
    folder = tmp_path_factory.mktemp("lora")
    config = lora_config(demo)
    config["optimizer"] = SMOOTH
    config["train"] = {"pairs_per_step": PER_STEP, "max_steps": 2}
    config["checkpoint"] = {"every": 1}
    for ranks, variants in VARIANTS.items():
        runs = [[*keys, f"output_dir={output_of(folder, n)}"] for n, keys in variants.items()]
        run(config, runs, folder, ranks)
    return folder


@pytest.fixture(scope="module")
def dropped(demo, tmp_path_factory):
    """The run with dropout on two ranks, uninterrupted, beside its configuration's file."""
    output = tmp_path_factory.mktemp("dropped") / "whole"
    config = output.with_name("config.json")
    config.write_text(json.dumps(dropout_config(demo)))
    code, told = run_ranks([str(config), f"output_dir={output}"], output.with_name("log"), ranks=2)
    assert code == 0, told
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_gradient_is_that_of_the_plain_run(name, folder):
    plain, variant = (stored(output_of(folder, n) / LAST, "optimizer") for n in ("plain", name))
    moments = [key for key in plain if key.startswith("exp_avg/")]
    assert len(moments) == 56 and plain.keys() == variant.keys()
    for key in moments:
        assert plain[key].norm() > 0
        assert (plain[key] - variant[key]).norm() <= 1e-4 * plain[key].norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_metrics_are_those_of_the_plain_run(name, folder):
    plain, variant = (metrics(output_of(folder, n)) for n in ("plain", name))
    assert abs(plain[1]["loss"] - plain[0]["loss"]) > 1e-3  # the first step has changed something
    for one, other in zip(plain, variant, strict=True):
        for key, value in one.items():
            if not key.startswith("perf/"):
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def by_hand(demo: Path, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the second step: transformers' model with W + scaling B A, in float64.

    One pair at a time; the reference is the model as it is.
    """
    (folder / "one.json").write_text(json.dumps(lora_config(demo)))
    pairs, _ = pairs_of(load_config(folder / "one.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft").double()
    base = {name: weight.detach() for name, weight in model.state_dict().items()}
    given = stored(output_of(folder, "plain") / FIRST, "adapter")
    adapters = {name: weight.double().requires_grad_() for name, weight in given.items()}
    layers = {name.rsplit(".", 1)[0] for name in adapters}
    summed = base | {
        f"{layer}.weight": base[f"{layer}.weight"]
        + SCALING * adapters[f"{layer}.lora_B"] @ adapters[f"{layer}.lora_A"]
        for layer in layers
    }

    def log_ratio(prompt: list[int], response: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *response]])
        rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
        policy, reference = (
            functional_call(model, weights, (ids,)).logits[0, rows].log_softmax(-1)
            for weights in (summed, base)
        )
        targets = ids[0, len(prompt) :, None]
        return (policy - reference).gather(1, targets).sum()

    chosen = pairs_of_step(1, pairs=len(pairs), pairs_per_step=PER_STEP, seed=42, shuffle=True)
    losses = []
    for index in chosen:
        prompt, good, bad = (pairs.tokens[part].tolist() for part in pairs.parts(index))
        margin = log_ratio(prompt, good) - log_ratio(prompt, bad)
        losses.append(-torch.nn.functional.logsigmoid(0.1 * margin))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(adapters.values()))
    return loss.item(), dict(zip(adapters, gradients, strict=True))


@pytest.mark.slow
def test_gradient_is_that_of_the_formula(demo, folder):
    loss, gradients = by_hand(demo, folder)
    output = output_of(folder, "plain")
    assert metrics(output)[1]["loss"] == pytest.approx(loss, rel=1e-5)
    moments = stored(output / LAST, "optimizer")
    for name, expected in gradients.items():
        found = moments[f"exp_avg/{name}"].double()
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.slow
def test_rewards_begin_at_exactly_0(folder, dropped):
    """Cached log-probs at an evaluation, and online ones in a step: the same rows either way."""
    first = metrics(dropped)[0]
    assert first["step"] == 0
    (online, _) = metrics(output_of(folder, "online reference, full checkpointing"))
    for line, prefix in ((first, "eval_"), (online, "")):
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert line[f"{prefix}{key}"] == 0.0, key


@pytest.mark.slow
def test_checkpoints_hold_the_adapters_alone(demo, folder):
    checkpoint = output_of(folder, "two ranks") / LAST
    weights = transformers.AutoModelForCausalLM.from_pretrained(demo / "sft").state_dict()
    expected = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            layer = name.removesuffix(".weight")
            expected[f"{layer}.lora_A"] = (LORA["rank"], weight.shape[1])
            expected[f"{layer}.lora_B"] = (weight.shape[0], LORA["rank"])
    adapters, state = stored(checkpoint, "adapter"), stored(checkpoint, "optimizer")
    assert {name: tuple(value.shape) for name, value in adapters.items()} == expected
    moments = {f"{kind}/{name}" for name in expected for kind in ("exp_avg", "exp_avg_sq")}
    assert state.keys() == moments
    numbers = sum(rows * columns for rows, columns in expected.values())
    for tensors, count in ((adapters, numbers), (state, 2 * numbers)):
        assert all(value.dtype == torch.float32 for value in tensors.values())
        assert sum(value.numel() for value in tensors.values()) == count
    files = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 12 * numbers < files < 12 * numbers + 200 * 3 * len(expected)  # headers
    # Nothing that would make transformers take the folder for a whole model.
    kinds = {file.name.partition("-0")[0] for file in checkpoint.iterdir()}
    described = {"state.json", "manifest.json"}
    indexes = {f"{kind}.safetensors.index.json" for kind in ("adapter", "optimizer")}
    assert kinds == {"adapter", "optimizer"} | described | indexes


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(dropped, tmp_path):
    broken, config = tmp_path / "broken", dropped.with_name("config.json")
    shutil.copytree(dropped, broken, ignore=shutil.ignore_patterns("final", "step-00000004"))
    code, told = run_ranks([str(config), f"output_dir={broken}"], tmp_path / "log", ranks=2)
    assert code == 0 and "step-00000002 after 2 steps" in told, told
    one, other = (
        [{k: v for k, v in line.items() if "perf/" not in k} for line in metrics(path)]
        for path in (dropped, broken)
    )
    assert one == other and len(one) == 5
    for prefix in ("adapter", "optimizer"):
        whole, resumed = (
            stored(path / "checkpoints/step-00000004", prefix) for path in (dropped, broken)
        )
        assert whole.keys() == resumed.keys() and len(whole) >= 56
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for file in ("final/adapter/adapter_model.safetensors", "final/model.safetensors"):
        assert (dropped / file).read_bytes() == (broken / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["loss.name=simpo"], ["model.reference={sft}"]], ids=str)
def test_the_base_must_be_the_one_it_began_with(demo, tmp_path, capfd, keys):
    """No checkpoint holds it, and here it is not the reference either, whose hash is compared."""
    config, base = lora_config(demo), tmp_path / "base"
    shutil.copytree(demo / "sft", base)
    config["model"]["policy"] = str(base)
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = [str(tmp_path / "config.json"), *(key.format(sft=demo / "sft") for key in keys)]
    arguments += ["train.max_steps=1", f"output_dir={tmp_path / 'out'}"]
    assert train.main(arguments) == 0
    shutil.rmtree(tmp_path / "out/final")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert train.main(arguments) == 2
    assert "made by another run (the weights under the adapters differ)" in capfd.readouterr().err


class Observed:
    """What a run of one process held: sizes at its last step, weights and log-probs at its end."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}


@pytest.fixture(scope="module")
def observed(demo, tmp_path_factory):
    """Three bfloat16 steps in this process, watched: what `train.py` calls is wrapped."""
    folder, found = tmp_path_factory.mktemp("observed"), Observed()
    # Published weights are bfloat16 too: then the base in memory is the base on disk.
    shutil.copytree(demo / "sft", folder / "base")
    weights = load_file(folder / "base/model.safetensors")
    halved = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(halved, folder / "base/model.safetensors", metadata={"format": "pt"})

    config = lora_config(demo, dropout=0.1, merge=True)
    config["model"] |= {"policy": str(folder / "base"), "compute_dtype": "bfloat16"}
    config["train"] |= {"pairs_per_step": 12, "max_steps": 3}
    config["optimizer"]["learning_rate"] = 1e-2
    config["parallel"]["activation_checkpointing"] = "full"
    config["output_dir"] = str(folder / "out")
    (folder / "config.json").write_text(json.dumps(config))

    def open_run(config, ranks, *others, **keys):
        found.run = original_open(config, ranks, *others, **keys)
        return found.run

    def clip(parameters, *others):
        named = found.run.policy.named_parameters()
        found.gradients = {name: p.grad.dtype for name, p in named if p.grad is not None}
        return original_clip(parameters, *others)

    def finish(run, *others):
        found.frozen = {n: p.full_tensor() for n, p in run.policy.named_parameters()}
        with adapters_off(run.policy):
            found.off = train.score(run.policy, run.pairs, range(9), run.rows)
        base = build.build_model(run, run.policy.shape, frozen=True)
        load_weights(base, run.models.source)
        found.base = train.score(base, run.pairs, range(9), run.rows)
        original_finish(run, *others)

    original_open, original_clip = train.open_run, train.clip_grad_norm_
    original_finish = train.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_run", open_run)
        patch.setattr(train, "clip_grad_norm_", clip)
        patch.setattr(train, "finish", finish)
        assert train.main([str(folder / "config.json")]) == 0
    found.weights, found.folder = halved, folder
    return found


def nbytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
def test_the_base_stays_what_it_was(observed):
    adapters = {name for name in observed.frozen if name not in observed.weights}
    assert len(adapters) == 56
    for name, weight in observed.weights.items():
        assert torch.equal(observed.frozen[name], weight), name
    assert all(observed.frozen[name].any() for name in adapters)
    assert torch.equal(observed.off, observed.base)


@pytest.mark.slow
def test_nothing_but_the_base_is_full_size(observed):
    """2 bytes of each frozen parameter, and of each trained one 4 + 4 (gradient) + 8 (AdamW)."""
    policy, state = observed.run.policy, observed.run.optimizer.state
    adapters = adapter_parameters(policy)
    frozen = [p for name, p in policy.named_parameters() if name not in adapters]
    count = sum(p.numel() for p in adapters.values())
    assert nbytes(frozen) == 2 * sum(weight.numel() for weight in observed.weights.values())
    assert nbytes(adapters.values()) == 4 * count
    assert observed.gradients == dict.fromkeys(adapters, torch.float32)
    assert len(state) == len(adapters)
    moments = [v for values in state.values() for key, v in values.items() if key != "step"]
    assert nbytes(moments) == 8 * count
    assert observed.run.following is None


@pytest.mark.slow
def test_merged_weights_are_the_sums_rounded_once(observed):
    merged = load_file(observed.folder / "out/final/model.safetensors")
    assert merged.keys() == observed.weights.keys()
    adapters = {n: p for n, p in observed.frozen.items() if n not in observed.weights}
    for name, weight in observed.weights.items():
        layer, expected = name.removesuffix(".weight"), weight.double()
        if f"{layer}.lora_A" in adapters:
            b, a = (adapters[f"{layer}.lora_{m}"].double() for m in "BA")
            expected = expected + SCALING * b @ a
            assert not torch.equal(merged[name], weight)
        assert merged[name].dtype == torch.bfloat16
        # Half a unit in the last of bfloat16's 8 digits, and float32's own error.
        assert ((merged[name].double() - expected).abs() <= 2.001**-8 * expected.abs()).all()


@pytest.mark.slow
def test_the_adapter_loads_with_peft(observed):
    peft = pytest.importorskip("peft")
    adapter = observed.folder / "out/final/adapter"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert len(saved) == 56
    for name, value in saved.items():
        ours = name.removeprefix("base_model.model.").removesuffix(".weight")
        assert torch.equal(value, observed.frozen[ours])
    base = transformers.AutoModelForCausalLM.from_pretrained(
        observed.folder / "base", dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        found = theirs(ids).logits
        with theirs.disable_adapter():
            bare = theirs(ids).logits
        weights = {n: w.double() for n, w in observed.weights.items()}
        for name in saved:
            if name.endswith("lora_A.weight"):
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b, a = (observed.frozen[f"{layer}.lora_{m}"].double() for m in "BA")
                weights[f"{layer}.weight"] += SCALING * b @ a
        model = transformers.AutoModelForCausalLM.from_config(base.config).double().eval()
        expected = functional_call(model, weights, (ids,)).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (bare - expected).abs().max() > 1e-2 * scale


def test_an_export_without_space_is_one_message(demo, tmp_path):
    """Of two ranks: no traceback from a barrier on the second, and nothing half-written."""
    config, output = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(lora_config(demo, merge=True)))
    arguments = [str(config), f"output_dir={output}", "train.max_steps=1"]
    code, told = run_ranks(arguments, tmp_path / "log", ranks=2, fault=no_space_for_adapters)
    assert code == 2 and "Traceback" not in told, told
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{output / 'final'}: cannot be written" in errors[0], told
    assert "No space left on device" in errors[0]
    assert not [path for path in output.iterdir() if "final" in path.name]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ['model.lora={"rank": 4, "alpha": 8, "target_modules": ["qproj"]}'],
            ('"qproj" names no linear layer', "q_proj, k_proj, v_proj, o_proj", '"all-linear"'),
        ),
        (['model.lora={"rank": 0, "alpha": 8}'], ("model.lora.rank: found 0, expected an int",)),
        (
            ["model.lora.dropout=1"],
            ("model.lora.dropout: found 1.0, expected a number",),
        ),
        (["model.lora.target_modules=[]"], ("model.lora.target_modules: found []", "one or more")),
        (["model.lora.r=8"], ("model.lora.r: unknown key; valid keys here: model.lora.rank",)),
        (
            ["reference.log_probs=online", "reference.sync_every=2"],
            ("model.lora: found with reference.sync_every 2, expected only one of them",),
        ),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_mistakes_are_named(demo, tmp_path, capfd, overrides, words, options):
    (tmp_path / "config.json").write_text(json.dumps(lora_config(demo)))
    output = tmp_path / "out"
    arguments = [str(tmp_path / "config.json"), *overrides, f"output_dir={output}", *options]
    assert train.main(arguments) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert all(word in printed for word in words), printed
    assert not output.exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_an_adapter_of_another_base_is_named(demo, tmp_path, capfd, options):
    """A base of the same layers, half as wide, under the adapter's matrices."""
    peft = pytest.importorskip("peft")
    base = transformers.AutoConfig.from_pretrained(demo / "sft")
    base.hidden_size //= 2
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(base), settings)
    model.peft_config["default"].base_model_name_or_path = str(demo / "sft")
    model.save_pretrained(tmp_path / "adapter")
    config = base_config(demo)
    config["model"]["policy"] = str(tmp_path / "adapter")
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = tmp_path / "out"
    arguments = [str(tmp_path / "config.json"), f"output_dir={output}", *options]
    assert train.main(arguments) == 2
    printed = capfd.readouterr().err
    assert "q_proj.lora_A.weight: found (2, 16), expected (2, 32)" in printed, printed
    assert "made for another base" in printed and not output.exists()
