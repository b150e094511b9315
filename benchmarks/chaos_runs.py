"""A tiny run in forks of this process: how it is killed and damaged, and what must come out of it.

The process must have imported everything and computed nothing. A run's folder is called `place`:
its output_dir and reference cache are in it, its config.json is next to it.
"""

import faulthandler
import hashlib
import json
import os
import random
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

import notus.card.card  # noqa: F401 (imported before the forks)
import train
from notus.files import PARTIAL, remove

LIMIT = 60.0  # seconds after which a run counts as hung
# Where a rank waits for a killed one to join a group, until torchrun ends it.
JOINING = re.compile(
    r" in (rendezvous|fresh_store|init_process_group|new_group|init_device_mesh)$", re.M
)
VARIANTS = {  # overrides and ranks
    "full": ([], 1),
    "adapters": (["model.lora.rank=4", "model.lora.alpha=8", "model.lora.merge=true"], 1),
    "best": (["evaluation.best=eval_rewards/accuracies", "evaluation.export_best=true"], 1),
    "following": (["reference.log_probs=online", "reference.sync_every=2"], 1),
    "two ranks": ([], 2),
}
FILES = ("flip", "zeros", "cut", "empty", "deleted", "folder", "link", "dangling", "swapped")
FOLDERS = ("deleted", "file", "link", "dangling")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fsync")
UNGUARDED = re.compile(r"run/(history.jsonl$|final/.*(?<!\.safetensors)$)")  # once a run is done
ADVICE = re.compile(r"(remove|delete) (it|the run|the folder|output_dir)\b", re.I)


class Killer(NamedTuple):
    """When a process is killed: before a file event, or at a time."""

    event: int | str = 0  # its number from 1, or a part of its path
    torn: bool = False  # a file that is about to get its name loses its second half
    seconds: float = LIMIT


class Ended(NamedTuple):
    """How a start ended."""

    codes: list[int]  # of the ranks; negative: the signal that killed it
    told: str  # what was printed


class Record(NamedTuple):
    """The files that a run has left, without TensorBoard's."""

    names: set[str]
    bits: dict[str, str]  # SHA-256 of each file of tensors
    metrics: list[dict]  # without perf/


class Base(NamedTuple):
    """An undisturbed run of a variant."""

    record: Record
    events: int
    seconds: float
    size: int  # bytes


def start(place: Path, variant: str, killers: Sequence[Killer] = (), size: int = 0) -> Ended:
    """train.py in `place`; a killer for each of the first ranks; size: limit of files in bytes."""
    overrides, ranks = VARIANTS[variant]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost"}
    if ranks > 1:  # as under torchrun, the store outlives the ranks
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        shared |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    reader, writer = os.pipe()
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            own = shared | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
            os.environ |= {key: str(value) for key, value in own.items()}
            os.dup2(writer, 1), os.dup2(writer, 2), os.close(writer), os.chdir(place)
            events = _arm(killers[rank] if rank < len(killers) else Killer())
            if size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            code = train.main([str(place.parent / "config.json"), *overrides])
            print("events:", next(events), flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, errors="replace") as pipe:
        told = pipe.read()
    return Ended([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children], told)


def _arm(killer: Killer) -> count:
    """Let this process be killed; the number of its next file event."""
    numbers, fsync = count(1), os.fsync
    signal.setitimer(signal.ITIMER_REAL, killer.seconds)  # not handled: the kernel kills
    faulthandler.dump_traceback_later(LIMIT - 2, file=2)  # where a hung one waits

    def seen(event: str, arguments: tuple) -> None:
        if not (event in CHANGES or (event == "open" and arguments[2] & WRITES)):
            return
        number, path = next(numbers), str(arguments[0])
        if number == killer.event or (isinstance(killer.event, str) and killer.event in path):
            if killer.torn and event == "os.rename" and PARTIAL in path and os.path.isfile(path):
                cut = os.open(path, os.O_WRONLY)
                os.ftruncate(cut, os.fstat(cut).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: (seen("fsync", (handle,)), fsync(handle))[1]  # has no audit event
    sys.addaudithook(seen)
    return numbers


def record(place: Path) -> Record:
    """The files of the run in `place` and of its reference cache; links to folders are followed."""
    walk = [(Path(at), names) for at, _, names in os.walk(place, followlinks=True)]
    files = [
        at / name
        for at, names in walk
        for name in names
        if not {"outside", "tensorboard"} & set(at.parts)
    ]
    names = {file.relative_to(place).as_posix() for file in files}
    bits = {
        file.relative_to(place).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.suffix == ".safetensors" and file.exists()
    }
    try:
        lines = [
            json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()
        ]
    except (OSError, ValueError):
        lines = []
    metrics = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    return Record(names, bits, metrics)


def misbehaved(ended: Ended) -> str:
    """The fault of a start that nobody killed; "" if it has none."""
    errors = [line for line in ended.told.splitlines() if line.startswith("error: ")]
    if "Traceback" in ended.told:
        return "a traceback"
    if ADVICE.search(ended.told):
        return "advice to remove a run"
    if set(ended.codes) not in ({0}, {2}) or (ended.codes[0] == 2) != (len(errors) == 1):
        return f"exit codes {ended.codes}, {len(errors)} errors"
    return ""


def differs(base: Base, place: Path, told: str, damaged: str = "") -> str:
    """How the end of a run differs from that of an undisturbed one; "" if it does not."""
    expected, found = base.record, record(place)
    aside = re.compile(r"\.damaged|/note$") if damaged else re.compile("$^")  # renamed, linked to
    names = {name for name in found.names if not aside.search(name)}
    wanted = expected.names
    gone = "the best checkpoint, is gone" in told  # a warning
    unsaved = "was not saved" in told  # warnings, and an error if it was the last one
    if gone or unsaved:
        names, wanted = ({n for n in all_ if "checkpoints/" not in n} for all_ in (names, wanted))
    if UNGUARDED.match(damaged):
        names, wanted = names - {damaged}, wanted - {damaged}
    if names != wanted:
        return f"left {sorted(names - wanted)}, lacks {sorted(wanted - names)}"
    if gone or (unsaved and "the best checkpoint is" in told):  # final/ may have another's weights
        wanted = {name for name in wanted if not name.startswith("run/final/")}
    if wrong := [name for name in wanted if found.bits.get(name) != expected.bits.get(name)]:
        return f"wrong bits in {wrong}"
    if damaged == "run/metrics.jsonl" or "metrics.jsonl" in told:  # a line of it may be changed
        steps = [line.get("step") for line in expected.metrics]
        if [line.get("step") for line in found.metrics] != steps and "metrics.jsonl" not in told:
            return "lines of metrics.jsonl are lost without a warning"
        changed = [line for line in found.metrics if line not in expected.metrics]
        return "wrong metrics" if len(changed) > bool(damaged) else ""
    return "" if found.metrics == expected.metrics else "wrong metrics"


def spoil(path: Path, kind: str, chance: random.Random, outside: Path) -> list[Path]:
    """Damage a file or folder; the paths that are no longer what they were."""
    content = bytearray(path.read_bytes() if path.is_file() else b"")
    place = chance.randrange(max(1, len(content)))
    if kind == "swapped":
        others = sorted(
            p
            for p in path.parent.iterdir()
            if p.is_file() and p.suffix == path.suffix and p != path
        )
        if others:
            other = chance.choice(others)
            path.write_bytes(other.read_bytes()), other.write_bytes(content)
            return [path, other]
        kind = "flip"
    if kind in ("flip", "zeros"):
        end = place + (512 if kind == "zeros" else 0)
        content[place:end] = bytes(len(content[place:end]))
        if kind == "flip" and content:
            content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    elif kind in ("cut", "empty"):
        os.truncate(path, place if kind == "cut" else 0)
    else:
        folder = path.is_dir()
        remove(path)
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.touch()
        elif kind == "link":
            path.symlink_to(outside / ("folder" if folder else "note"))
        elif kind == "dangling":
            path.symlink_to(outside / "nothing")
    return [path]


def forked(function: Callable[[], object]) -> None:
    """Call it in a fork: PyTorch must not have computed anything in what is forked again."""
    child = os.fork()
    if not child:
        function()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def settings(demo: Path) -> dict:
    """The configuration of the run: four steps, all saved, with held-out pairs."""
    source = {"path": str(demo / "preferences.jsonl"), "curation": {"rule": "mean-rating"}}
    lengths = {"max_length": 96, "max_prompt_length": 48, "tokens_per_microbatch": 512}
    return {
        "model": {"policy": str(demo / "sft"), "compute_dtype": "float32"},
        "data": {"train": [source], "eval": {"holdout": 4}, **lengths},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"pairs_per_step": 4, "max_steps": 4},
        "evaluation": {"every": 1},
        "parallel": {"device": "cpu", "activation_checkpointing": "none"},
        "checkpoint": {"every": 1, "keep": 2},
        "output_dir": "run",
    }
