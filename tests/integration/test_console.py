"""What train.py says while it trains, to a file: a few whole lines, of rank 0 alone."""

import json
import re

import pytest

from runs import base_config, run

pytestmark = pytest.mark.slow


def test_a_run_speaks_once_in_plain_lines(demo, tmp_path):
    """Three ranks, one of which has no pair in any step: it idles, and the others' run goes on."""
    config = base_config(demo)
    config["train"] = {"pairs_per_step": 2, "max_steps": 2}
    config["output_dir"] = str(tmp_path / "run")
    done = run(config, [[]], tmp_path, ranks=3)
    said = done.stdout + done.stderr
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    losses = [json.loads(s)["loss"] for s in (tmp_path / "run/metrics.jsonl").open()]
    steps = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    for step, (line, loss) in enumerate(zip(steps, losses, strict=True), start=1):
        assert line.startswith(f"step {step} of 2, loss {loss:.4f}, ")
        assert re.search(r", \d\d:\d\d so far, \d\d:\d\d left$", line)
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) == len(set(lines)) < 10
    assert f"wrote {tmp_path / 'run/final'}" in lines
    idle = "a step has 2 pairs, so at least 1 of 3 ranks idle in every step"
    assert sum(idle in line for line in lines) == 1
