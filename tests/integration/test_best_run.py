"""Named evaluation sets and the best checkpoint in whole runs, also after a kill."""

import json
import re
from functools import partial

import pytest
import torch
from lines import write_lines

from faults import wait_in_step
from notus.curation.curate import Curation
from notus.data.preferences import Source, load_preferences
from ranks import kill, run_ranks, start, train_each, wait_for, wait_for_words
from runs import base_config, checkpoints, metrics, stored

STEPS = 6


@pytest.fixture(scope="module")
def config(demo, tmp_path_factory) -> str:
    """The file of a run of six steps, the last of which is the worst on swapped pairs."""
    settings = base_config(demo)
    (source,) = settings["data"]["train"]
    folder = tmp_path_factory.mktemp("best")
    curation = Curation(rule="mean-rating")
    held_out = Source(path=str(demo / "heldout.jsonl"), curation=curation)
    rows = [
        {"prompt": pair.prompt, "chosen": pair.rejected, "rejected": pair.chosen}
        for pair in load_preferences([held_out], seed=0).train
    ]
    write_lines(folder / "swapped.jsonl", rows)
    swapped = {"path": str(folder / "swapped.jsonl"), "weight": 0.5}
    settings["data"]["eval"] = {"far": swapped, "own": source}
    settings["optimizer"]["learning_rate"] = 1e-2
    settings["train"] = {"pairs_per_step": 12, "epochs": 2, "max_steps": STEPS}
    settings["evaluation"] = {"every": 2, "best": "eval_far/loss", "export_best": True}
    settings["checkpoint"] = {"every": 2, "keep": 1}
    file = folder / "config.json"
    file.write_text(json.dumps(settings))
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_it_has_the_same_best(config, ranks, tmp_path):
    """To the bit; the run that is killed has been left alone up to the second last step."""
    runs = [[config, f"output_dir={tmp_path / name}"] for name in ("whole", "killed")]
    log = tmp_path / "log"
    processes = start(train_each, runs, partial(wait_in_step, 2 * STEPS), log=log, ranks=ranks)
    try:
        wait_for_words(log, f"waits in step {2 * STEPS}")
        wait_for((tmp_path / f"killed/checkpoints/step-{STEPS - 2:08d}").exists)
    finally:
        kill(processes)
    whole, killed = both = tmp_path / "whole", tmp_path / "killed"
    code, told = run_ranks(runs[1], log, ranks)
    assert code == 0 and f"after {STEPS - 2} steps" in told
    lines = [line for line in metrics(whole) if "eval_loss" in line]
    values = {line["step"]: line["eval_far/loss"] for line in lines if line["step"]}
    best = min(values, key=values.get)
    assert best < STEPS and len(values) == 3
    names = [f"step-{best:08d}", f"step-{STEPS:08d}"]
    assert checkpoints(whole) == checkpoints(killed) == names
    last = [json.loads((run / "checkpoints" / names[1] / "state.json").read_text()) for run in both]
    assert last[0]["best"] == last[1]["best"]
    assert (last[0]["best"]["step"], last[0]["best"]["value"]) == (best, values[best])
    for one, other in zip(metrics(whole), metrics(killed), strict=True):
        assert {k: v for k, v in one.items() if "perf/" not in k} == {
            k: v for k, v in other.items() if "perf/" not in k
        }
    expected = stored(whole / "checkpoints" / names[0], "model")
    for run in both:
        found = stored(run / "final", "model")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name].bfloat16()) for name in found)
    assert f"weights are those after step {best}, the best by eval_far" in " ".join(
        (killed / "final/README.md").read_text().split()
    )
    (after,) = re.findall(r"^eval_far/loss +\S+ +(\S+)$", told, re.M)
    assert float(after) == pytest.approx(values[best], abs=1e-4)
