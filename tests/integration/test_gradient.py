"""The gradient of a step does not depend on how the step is computed.

Each variant runs train.py for one step. AdamW's first moment is then (1 - beta_1) times the
gradient, and the checkpoint holds it in full.
"""

import pytest
import torch

from runs import base_config, metrics, run, stored

VARIANTS = {
    1: {
        "plain": [],
        "budget 128": ["data.tokens_per_microbatch=128"],
        "budget 4096": ["data.tokens_per_microbatch=4096"],
        "no sharing": ["data.prefix_sharing=false"],
        "selective checkpointing": ["parallel.activation_checkpointing=selective"],
        "full checkpointing": ["parallel.activation_checkpointing=full"],
        "online reference": ["reference.log_probs=online"],
        "cpu offload": ["parallel.cpu_offload=true"],
        "kept gathered": ["parallel.keep_gathered=true", "data.tokens_per_microbatch=128"],
    },
    2: {
        "two ranks": [],
        "two ranks, no sharing, small budget": [
            "data.prefix_sharing=false",
            "data.tokens_per_microbatch=128",
        ],
        "two replicas": ["parallel.replicate=2"],
        "two ranks, full checkpointing, online reference": [
            "parallel.activation_checkpointing=full",
            "reference.log_probs=online",
        ],
    },
    4: {
        "four ranks": [],
        "hybrid 2 x 2": ["parallel.replicate=2", "parallel.shard=2"],
        "four ranks, small budget": ["data.tokens_per_microbatch=128"],
        "hybrid 2 x 2, small budget, kept gathered": [
            "parallel.replicate=2",
            "parallel.shard=2",
            "data.tokens_per_microbatch=128",
            "parallel.keep_gathered=true",
        ],
    },
}
NAMES = [name for variants in VARIANTS.values() for name in variants]


@pytest.fixture(scope="module")
def outputs(demo, other, tmp_path_factory):
    """One finished step of every variant: name -> output_dir."""
    folder = tmp_path_factory.mktemp("gradient")
    config = base_config(demo)
    config["model"]["reference"] = str(other)  # with the policy itself all pairs weigh the same
    config["optimizer"]["max_grad_norm"] = 1e9
    config["train"]["max_steps"] = 1
    outputs = {name: folder / name.replace(",", "").replace(" ", "-") for name in NAMES}
    for ranks, variants in VARIANTS.items():
        runs = [[*keys, f"output_dir={outputs[name]}"] for name, keys in variants.items()]
        run(config, runs, folder, ranks)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_gradient_is_that_of_the_plain_run(name, outputs):
    plain, variant = (
        stored(outputs[n] / "checkpoints/step-00000001", "optimizer") for n in ("plain", name)
    )
    assert plain.keys() == variant.keys()
    parameters = stored(outputs["plain"] / "checkpoints/step-00000001", "model")
    moments = {f"exp_avg/{parameter}" for parameter in parameters}
    assert len(moments) == 39
    scale = torch.stack([plain[key].norm() for key in moments]).norm()
    difference = torch.stack([(plain[key] - variant[key]).norm() for key in moments]).norm()
    assert scale > 0
    assert difference <= 1e-5 * scale
    for key in moments:  # and no tensor hides behind the others
        assert (plain[key] - variant[key]).norm() <= 1e-4 * plain[key].norm() + 1e-7 * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_metrics_are_those_of_the_plain_run(name, outputs):
    (plain,), (variant,) = (metrics(outputs[n]) for n in ("plain", name))
    for key, value in plain.items():
        if not key.startswith("perf/"):
            assert variant[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
