"""A step with the Triton kernels forced, in their interpreter, is the step with the plain ones."""

import pytest

from conftest import needs_interpreter
from runs import base_config, metrics, run, stored

RUNS = {
    f"{loss}-{kernels}": [f"loss.name={loss}", f"parallel.kernels={kernels}"]
    for loss in ("sigmoid", "wpo")  # wpo also asks for log sum p^2
    for kernels in ("plain", "triton")
}


@pytest.fixture(scope="module")
def outputs(demo, other, tmp_path_factory):
    """One step of every run on two ranks, the head's weight sharded: name -> output_dir."""
    folder = tmp_path_factory.mktemp("kernels")
    config = base_config(demo)
    config["model"]["reference"] = str(other)
    config["optimizer"]["max_grad_norm"] = 1e9
    config["train"] |= {"max_steps": 1, "pairs_per_step": 8}
    outputs = {name: folder / name for name in RUNS}
    overrides = [[*keys, f"output_dir={outputs[name]}"] for name, keys in RUNS.items()]
    run(config, overrides, folder, ranks=2)
    return outputs


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("loss", ["sigmoid", "wpo"])
def test_loss_and_gradient_are_those_of_the_plain_definition(loss, outputs):
    plain, forced = (outputs[f"{loss}-{kernels}"] for kernels in ("plain", "triton"))
    # AdamW's first moment after one step is (1 - beta_1) times the gradient.
    expected, found = (
        stored(output / "checkpoints/step-00000001", "optimizer") for output in (plain, forced)
    )
    moments = [key for key in expected if key.startswith("exp_avg/")]
    assert "exp_avg/lm_head.weight" in moments
    for key in moments:
        difference = (expected[key] - found[key]).norm()
        assert 0 < expected[key].norm() and difference <= 1e-5 * expected[key].norm(), key
    for ours, theirs in zip(metrics(forced), metrics(plain), strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
