"""What to run first on a GPU: tests, rounding, speed, memory, attention's tiles; nine minutes.

    python -m benchmarks.first_gpu [--folder first_gpu]
    python -m benchmarks.first_gpu --toy            # the same parts at toy size on the CPU

Every part is a process with a time limit, so that one that fails or hangs hides no other. The
limits sum to nine minutes, and what one part leaves of its time the next may use. A part's report
is <part>.json, what it printed <part>.out and <part>.err; report.json holds the outcomes after
every part. The table at the end shows each part's last line, which is the number that matters, or
its error. Exit code: 1 if a part failed or was cut off, 2 without a GPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from notus.files import write_json
from notus.tables import text_table

REPOSITORY = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """Something to run. limit: seconds. command, toy: Python's arguments on a GPU, on the CPU.

    An empty toy: the part needs a GPU.
    """

    name: str
    limit: int
    command: str
    toy: str


PARTS = (
    Part("tests", 180, "-m pytest -q -x -m gpu", "-m pytest -q tests/integration/test_cuda.py"),
    Part(
        "rounding",
        40,
        "-m benchmarks.rounding --json {json}",
        "-m benchmarks.rounding --toy --pairs 8 --json {json}",
    ),
    Part(
        "head",
        60,
        "-m benchmarks.head --usual --methods eager compile descriptors plain triton --json {json}",
        "-m benchmarks.head --toy --methods eager plain --json {json}",
    ),
    Part(
        "speed",
        140,
        "-m benchmarks.train_speed --model A --sides notus --steps 8 --trace --json {json}",
        "-m benchmarks.train_speed --model tiny --sides notus --trace --pairs-per-step 2 "
        "--steps 2 --json {json}",
    ),
    Part(
        "memory",
        60,
        "-m benchmarks.memory --json {json}",
        "-m benchmarks.memory --toy --ranks 1 --json {json}",
    ),
    Part("tiles", 60, "-m benchmarks.flex_tiles --seconds 0.2 --json {json}", ""),
)


def run_part(part: Part, toy: bool, folder: Path, limit: float) -> dict[str, str | float]:
    """Run a part to its end, or for `limit` seconds; what the table shows of it."""
    report = folder / f"{part.name}.json"
    words = [word.replace("{json}", str(report)) for word in (part[2 + toy]).split()]
    out, err = (folder / f"{part.name}.{stream}" for stream in ("out", "err"))
    variables = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if toy else {"NOTUS_TEST_GPU": "1"})
    began = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env=variables,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = "cut off"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            process.wait()
    said = [line for line in out.read_text(errors="replace").splitlines() if line.strip()]
    errors = re.findall(r"^(?:error:|[\w.]+Error\b).*", err.read_text(errors="replace"), re.M)
    last = errors if errors and outcome.startswith("failed") else said
    return {
        "part": part.name,
        "seconds": time.monotonic() - began,
        "outcome": outcome,
        "last line": last[-1].strip()[:200] if last else "",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="the same parts on the CPU, small")
    parser.add_argument("--folder", type=Path, default=Path("first_gpu"), help="what is written")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        print("error: no CUDA GPU was found; --toy runs the parts on the CPU", file=sys.stderr)
        return 2
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"torch": torch.__version__, "parts": []}
    began, limits = time.monotonic(), 0
    for part in (part for part in PARTS if part.toy or not options.toy):
        limits += part.limit
        limit = began + limits - time.monotonic()
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        report["parts"].append(run_part(part, options.toy, folder, limit))
        write_json(folder / "report.json", report)
    rows = [list(part.values()) for part in report["parts"]]
    print(text_table(list(report["parts"][0]), rows, digits=0))
    return int(any(part["outcome"] != "ok" for part in report["parts"]))


if __name__ == "__main__":
    sys.exit(main())
