"""Killed at random moments, out of disk, started twice, not finite: nothing is lost or hidden."""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from lines import read_lines

from faults import disk_full, slow_disk, small_files, spoil_pair, spoil_steps, wait_in_step
from notus.config import load_config
from ranks import finish, kill, launch, run_ranks, start, train_each, wait_for, wait_for_words
from runs import base_config, checkpoints, metrics, pairs_of, steps_logged, stored


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> str:
    """The file of a run of eight steps that saves after each."""
    settings = base_config(demo)
    settings["train"] = {"pairs_per_step": 8, "epochs": 2, "max_steps": 8}
    settings["checkpoint"] = {"every": 1, "keep": 2}
    file = tmp_path_factory.mktemp("crash") / "config.json"
    file.write_text(json.dumps(settings))
    return str(file)


def whole(config: str, ranks: int) -> Path:
    """The output of a run that nobody disturbs."""
    output = Path(config).parent / f"whole-{ranks}"
    if not output.exists():
        code, told = run_ranks([config, f"output_dir={output}"], output.with_suffix(".log"), ranks)
        assert code == 0, told
    return output


def same_end(one: Path, other: Path) -> bool:
    """Whether all losses, weights and moments are equal to the bit, and nothing lies about."""
    losses = [[line["loss"] for line in metrics(output)] for output in (one, other)]
    last = checkpoints(one)[-1]
    tensors = [
        stored(output / "checkpoints" / last, prefix)
        for output in (one, other)
        for prefix in ("model", "optimizer")
    ]
    equal = all(
        len(mine) > 10
        and mine.keys() == yours.keys()
        and all(torch.equal(mine[name], yours[name]) for name in mine)
        for mine, yours in zip(tensors[:2], tensors[2:], strict=True)
    )
    return equal and losses[0] == losses[1] and not list(other.rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 10), (2, 5)])
def test_killed_again_and_again(config, ranks, kills, tmp_path):
    """Started until it has been killed that often; runs that came to their end are begun anew."""
    expected, chance, log = whole(config, ranks), random.Random(ranks), tmp_path / "log"
    runs, killed, in_saves = 0, 0, 0
    while killed < kills:
        output = tmp_path / f"run-{runs}"
        arguments = [config, f"output_dir={output}"]
        if killed_at_random(launch(arguments, log, ranks, slow_disk), output, chance):
            killed += 1
            in_saves += bool(list((output / "checkpoints").glob(".partial-*")))
        if killed == kills or (output / "final").exists():
            code, told = run_ranks(arguments, log, ranks)
            assert code == 0, told
            assert same_end(expected, output)
            runs += 1
    assert in_saves >= kills // 4, f"only {in_saves} of {killed} were killed in a save"
    assert ranks > 1 or "Traceback" not in log.read_text()  # beside others, a rank's death is one


def killed_at_random(processes: list[BaseProcess], output: Path, chance: random.Random) -> bool:
    """Kill them, one first; some while they start, most in a step or save. Or they end."""

    def alive() -> bool:
        return all(process.exitcode is None for process in processes)

    seen = steps_logged(output)
    if chance.random() < 0.7:
        wait_for(lambda: steps_logged(output) > seen or not alive())
    time.sleep(chance.uniform(0.0, 0.5))
    if not alive():
        assert finish(processes) == 0
        return False
    chance.choice(processes).kill()
    time.sleep(chance.choice((0.0, 0.2)))
    kill(processes)
    return True


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint(config, tmp_path):
    output = tmp_path / "run"
    code, told = run_ranks([config, f"output_dir={output}"], tmp_path / "log", 2, disk_full)
    assert code == 0
    (warning,) = [line for line in told.splitlines() if line.startswith("warning: ")]
    for part in ("step-00000004 was not saved", "No space left on device", "optimizer-0000"):
        assert part in warning
    assert "step-00000003 is kept, and training continues" in warning
    assert checkpoints(output) == ["step-00000007", "step-00000008"]
    expected = whole(config, 2)
    assert [m["loss"] for m in metrics(output)] == [m["loss"] for m in metrics(expected)]


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_in_an_error(config, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole(config, 1), output, ignore=shutil.ignore_patterns("final", "*08"))
    code, told = run_ranks([config, f"output_dir={output}"], tmp_path / "log", 1, small_files)
    assert code == 2
    assert "step-00000008 was not saved" in told and "File too large" in told
    assert "error: the last checkpoint was not saved" in told
    assert checkpoints(output) == ["step-00000007"]  # the one that the run began with
    assert (output / "final/config.json").is_file()  # small enough in bfloat16
    assert not list(output.rglob(".partial-*"))


@pytest.mark.slow
def test_two_runs_in_one_output_dir(config, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = [config, f"output_dir={output}"]
    (rank,) = launch(arguments, log, fault=partial(wait_in_step, 2))
    wait_for_words(log, "waits in step 2")
    code, told = run_ranks(arguments, tmp_path / "other")
    assert code == 2
    assert f"error: output_dir: {output} is in use by another run (" in told
    assert f'"pid": {rank.pid}' in told
    kill([rank])
    assert str(rank.pid) in (output / "lock").read_text()  # stale, which a new start recognises
    assert run_ranks(arguments, log)[0] == 0
    assert (output / "lock").read_text() == ""


def as_torchrun(arguments: list[str], fault: Callable[[], None]) -> None:
    """Start train.py in a process of its own, as torchrun does, and wait for it."""
    if child := os.fork():
        os.waitpid(child, 0)
        os._exit(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {f"{kind}_WORLD_SIZE": "1" for kind in ("GROUP", "LOCAL")}
    os._exit(train_each([arguments], fault))


@pytest.mark.slow
def test_a_run_whose_torchrun_was_killed_saves_and_ends(config, tmp_path):
    """And is in the way of a new start until then."""
    output, log, held = tmp_path / "run", tmp_path / "log", tmp_path / "held"
    arguments = [config, f"output_dir={output}"]
    held.touch()
    (parent,) = start(as_torchrun, arguments, partial(wait_in_step, 2, held=held), log=log)
    wait_for_words(log, "waits in step 2")
    parent.kill()
    wait_for_words(log, "was signalled")
    code, told = run_ranks(arguments, tmp_path / "other")
    assert code == 2 and f"error: output_dir: {output} is in use by another run (" in told
    held.unlink()
    wait_for(lambda: (output / "lock").read_text() == "")
    assert "stopped by a signal after 2 steps" in log.read_text()
    assert checkpoints(output) == ["step-00000001", "step-00000002"]


@pytest.mark.slow
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(config, spoilt, tmp_path):
    output = tmp_path / "run"
    keys = ["train.pairs_per_step=24", "checkpoint.keep=12", f"output_dir={output}"]
    lengths = [tuple(row) for row in pairs_of(load_config(config))[0].lengths[:, 1:].tolist()]
    spoilt_pair = next(index for index, own in enumerate(lengths) if lengths.count(own) == 1)
    fault = partial(spoil_pair, lengths[spoilt_pair], float(spoilt == "loss"))
    code, told = run_ranks([config, *keys], tmp_path / "log", 2, fault)
    assert code == 0, told
    # The pair comes once in each of the two epochs.
    records = read_lines(output / "nonfinite.jsonl")
    lines = metrics(output)
    assert [record["step"] for record in records] == [m["step"] for m in lines if m["nonfinite"]]
    assert len(records) == 2 and len(lines) == 6
    for record in records:
        pairs = {pair["index"]: pair["where"] for pair in record["pairs"]}
        assert "preferences.jsonl:" in pairs[spoilt_pair]
        alone = spoilt == "loss"  # a gradient alone does not tell whose it is
        assert (len(pairs) == 1) == alone and (record["loss"] == "inf") == alone
        assert not alone or record["grad_norm"] != "nan"
        line = lines[record["step"] - 1]
        assert "loss" not in line and line["nonfinite"] == 1 and line["learning_rate"] >= 0
        before, after = (
            stored(output / f"checkpoints/step-{record['step'] + d:08d}", "model") for d in (-1, 0)
        )
        assert all(torch.equal(before[name], after[name]) for name in before)
    state = json.loads((output / "checkpoints/step-00000006/state.json").read_text())
    assert (state["step"], state["updates"]) == (6, 4)
    assert state["skipped"] == (records[-1]["step"] == 6)


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_and_a_resumed_one_counts_on(config, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = [config, "train.max_nonfinite=4", f"output_dir={output}"]
    code, told = run_ranks(arguments, log, 1, partial(spoil_steps, 3))
    assert code == 2 and "error: step 6: loss nan" in told and "the last of 4 steps" in told
    assert checkpoints(output)[-1] == "step-00000005"
    code, told = run_ranks(arguments, log, 1, partial(spoil_steps, 1))
    assert code == 2 and "after 5 steps" in told and "error: step 6:" in told
    assert len((output / "nonfinite.jsonl").read_text().splitlines()) == 4
    # Once the cause is gone, the run goes on from where its weights are sound.
    code, told = run_ranks(arguments, log)
    assert code == 0 and "after 5 steps" in told
