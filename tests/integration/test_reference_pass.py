"""An interrupted reference pass on several ranks: it is resumed and leaves no partial files."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faults import small_parts
from ranks import finish, kill, launch, run_ranks, wait_for
from runs import base_config


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> str:
    """The file of a run of one step, over 64 pairs: eight parts."""
    settings = base_config(demo)
    settings["train"] = {"pairs_per_step": 8, "max_steps": 1}
    file = tmp_path_factory.mktemp("reference") / "config.json"
    file.write_text(json.dumps(settings))
    return str(file)


def log_probs(output: Path) -> torch.Tensor:
    """The log-probs of the only cache next to a run; there must be no parts."""
    (file,) = (output.parent / "reference-cache").glob("*.safetensors")
    assert not (output / "reference").exists()
    assert sorted(f.suffix for f in file.parent.iterdir()) == [".json", ".safetensors"]
    return load_file(file)["log_probs"]


@pytest.fixture(scope="module")
def whole(config) -> torch.Tensor:
    """The log-probs of an uninterrupted pass on two ranks."""
    output = Path(config).parent / "whole"
    code, _ = run_ranks(
        [config, f"output_dir={output}"], output.with_suffix(".log"), 2, small_parts
    )
    assert code == 0
    return log_probs(output)


@pytest.mark.parametrize("ranks", [2, 1])
def test_killed_in_the_pass(config, whole, tmp_path, ranks):
    """Resumed after SIGKILL: bit-identical on as many ranks, up to rounding on others."""
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = [config, f"output_dir={output}"]
    processes = launch(arguments, log, 2, small_parts)
    try:
        wait_for(lambda: any(f.stat().st_size for f in output.glob("reference/*.parts")))
    finally:
        kill(processes)
    (parts,) = output.glob("reference/*.parts")
    assert 0 < parts.stat().st_size < 4 * len(whole)
    code, told = run_ranks(arguments, log, ranks, small_parts)
    assert code == 0, told
    found = log_probs(output)
    if ranks == 2:
        assert torch.equal(found, whole)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_two_runs_that_start_together(config, whole, tmp_path):
    """One makes the pass, on two ranks or on one; the other waits for it."""
    logs = [tmp_path / "two.log", tmp_path / "one.log"]
    runs = [
        launch([config, f"loss.beta={beta}", f"output_dir={log.with_suffix('')}"], log, n, part)
        for log, beta, n, part in zip(logs, (0.1, 0.5), (2, 1), (small_parts,) * 2, strict=True)
    ]
    assert [finish(run) for run in runs] == [0, 0]
    told = [log.read_text() for log in logs]
    assert sorted("waiting for another run" in words for words in told) == [False, True]
    assert sorted("no pass" in words for words in told) == [False, True]
    torch.testing.assert_close(log_probs(tmp_path / "two"), whole, rtol=1e-5, atol=1e-5)


def test_no_space_in_the_pass(config, whole, tmp_path):
    """One message, and all ranks end; with space again it resumes after the second part."""
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = [config, f"output_dir={output}"]
    code, told = run_ranks(arguments, log, 2, partial(small_parts, 3))
    assert code == 2
    assert told.count("error: ") == 1 and "Traceback" not in told
    assert ".parts: cannot be read or written (No space left on device)" in told
    code, told = run_ranks(arguments, log, 2, small_parts)
    assert code == 0, told
    assert torch.equal(log_probs(output), whole)
