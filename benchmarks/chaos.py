"""Kills, damaged files and full disks: what they do to a run that the same command resumes.

    python -m benchmarks.chaos                 # all cases: 17 minutes on two quiet CPU cores
    python -m benchmarks.chaos --case damage-17  # only one of them

A tiny model trains in forks of this process. Each case is judged against the same run undisturbed:

- kill: SIGKILL before a file event (a file opened for writing, synced, renamed, removed; half of
  them with the file written by half), or at a time, two to four times in a row. Then the same
  command must end with equal weights, caches and metrics (apart from perf/) and the same files.
- damage: one file or folder of an interrupted or ended run is spoilt. The command must end as above
  or refuse with one error that names it; the refused run must end as above once it is undone.
- disk: the run has a file system of a random size (a tmpfs; without the right to mount one, a
  limit on each file's size). Then it has room, and the same command must end as above.

Not judged, because nothing guards them: changed digits in metrics.jsonl and history.jsonl, and
changes to files of final/ that are not weights. Lines of metrics.jsonl may be lost to damage or to
a full disk, with a warning; checkpoints may be lost to a full disk, with an error. On two ranks,
one that waits for a killed one to join a group is torchrun's to end. What a failed case printed
follows its line. Exit code 1: a case failed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.chaos_runs import (
    FILES,
    FOLDERS,
    JOINING,
    VARIANTS,
    Base,
    Killer,
    differs,
    forked,
    misbehaved,
    record,
    settings,
    spoil,
    start,
)
from notus.demo import write_demo
from notus.engine.history import versions
from notus.files import remove
from notus.objective import cache_files

DRAWN = ["full"] * 3 + ["best", "adapters", "following", "two ranks", "two ranks"]
READ_AT_END = re.compile("run(/(final|config.json|history.jsonl|lock).*)?$")  # of a finished run


class Case(NamedTuple):
    """A case's outcome."""

    name: str
    done: str  # what happened
    kills: int
    failure: str  # "": none
    told: str


class Chaos:
    """The cases of a seed, in folders of `root`, and what they are judged against."""

    def __init__(self, root: Path, seed: int, variants: Sequence[str]) -> None:
        self.root, self.seed, self.variants = root, seed, variants
        self.drawn = [variant for variant in DRAWN if variant in variants]
        self.bases: dict[str, Base] = {}
        self.damages: list[tuple[str, str, str, str]] = []

    def prepare(self) -> None:
        """Run each variant undisturbed, and make the folders that damages are done to."""
        forked(lambda: write_demo(self.root / "demo", 40, 0, 32, 450))
        (self.root / "config.json").write_text(json.dumps(settings(self.root / "demo")))
        for variant in self.variants:
            place = self.root / f"ended {variant}"
            place.mkdir()
            begin = time.perf_counter()
            ended = start(place, variant)
            seconds = time.perf_counter() - begin
            assert set(ended.codes) == {0}, ended.told
            events = max(map(int, re.findall("^events: (\\d+)", ended.told, re.M)))
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            self.bases[variant] = Base(record(place), events, seconds, size)
            if variant == "two ranks":
                continue
            half = self.root / f"interrupted {variant}"
            half.mkdir()
            assert start(half, variant, [Killer(event=".partial-step-00000004")]).codes == [-9]
            for stage in (place, half):
                for path in sorted(stage.rglob("*")):
                    name = path.relative_to(stage).as_posix()
                    if stage == half or READ_AT_END.match(name):
                        kinds = FOLDERS if path.is_dir() else FILES
                        if name == "run/history.jsonl" and stage == place:
                            kinds = kinds[:-1]  # exchanged with metrics.jsonl, which nobody reads
                        self.damages += [(variant, stage.name, name, kind) for kind in kinds]
        random.Random(self.seed).shuffle(self.damages)

    def case(self, name: str) -> Case:
        """Do the case of this name, in a folder of its own, which is removed."""
        kind, number = name.split("-")
        place = self.root / name
        try:
            return getattr(self, kind)(
                name, int(number), place, random.Random(f"{self.seed} {name}")
            )
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def kill(self, name: str, number: int, place: Path, chance: random.Random) -> Case:
        """Two to four kills, and the command again."""
        variant = self.drawn[number % len(self.drawn)]
        base, ranks = self.bases[variant], VARIANTS[variant][1]
        place.mkdir()
        kills, told, done = 0, "", [variant]
        for _ in range(2 + number % 3):
            killers = [Killer()] * ranks
            killer = Killer(seconds=chance.uniform(0.01, base.seconds))
            if chance.random() < 0.6:
                killer = Killer(chance.randint(1, base.events), chance.random() < 0.5)
            killers[victim := chance.randrange(ranks)] = killer
            ended = start(place, variant, killers)
            killed = ended.codes[victim] in (-signal.SIGKILL, -signal.SIGALRM)
            kills, told = kills + killed, told + ended.told
            done.append(f"{killer}" if killed else "ended before")
            others = ended.codes[:victim] + ended.codes[victim + 1 :]
            if -signal.SIGALRM in others and not JOINING.search(ended.told):
                return Case(name, ", ".join(done), kills, "a rank hung", told)
            if ranks == 1 and "Traceback" in ended.told:
                return Case(name, ", ".join(done), kills, "a traceback", told)
        ended = start(place, variant)
        wrong = misbehaved(ended) or ("refused" if ended.codes[0] else "")
        wrong = wrong or differs(base, place, "")
        return Case(name, ", ".join(done), kills, wrong, told + ended.told)

    def damage(self, name: str, number: int, place: Path, chance: random.Random) -> Case:
        """One damage, and the command again."""
        variant, stage, target, kind = self.damages[number % len(self.damages)]
        shutil.copytree(self.root / stage, place, symlinks=True)
        outside = place / "outside"
        (outside / "folder").mkdir(parents=True)
        for note in (outside / "note", outside / "folder/note"):
            note.write_text(name)
        spoilt = spoil(place / target, kind, chance, outside)
        ended = start(place, variant)
        done, wrong, told = f"{stage}: {target} {kind}", misbehaved(ended), ended.told
        if not wrong and ended.codes[0] == 2:
            done += ": refused"
            error = next(line for line in told.splitlines() if line.startswith("error: "))
            if not any(part in error for part in Path(target).parts[-2:]):
                wrong = "the error does not name it"
            for path in spoilt:
                remove(path)
                source = self.root / stage / path.relative_to(place)
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, path)
            ended = start(place, variant)
            told += ended.told
            wrong = wrong or misbehaved(ended) or ("refused when undone" if ended.codes[0] else "")
        wrong = wrong or differs(self.bases[variant], place, told, target)
        notes = [n.read_text() for n in (outside / "note", outside / "folder/note") if n.exists()]
        if notes != [name] * 2 or (outside / "nothing").exists():
            wrong = wrong or "a link was followed"
        return Case(name, done, 0, wrong, told)

    def disk(self, name: str, number: int, place: Path, chance: random.Random) -> Case:
        """A file system without room, and with room."""
        variant = self.drawn[number % len(self.drawn)]
        base = self.bases[variant]
        size = int(8192 * (1.5 * base.size / 8192) ** chance.random())
        place.mkdir()
        mounted = mount(place, f"size={size}")
        try:
            ended = start(place, variant, size=0 if mounted else size // 4)
            wrong, told = misbehaved(ended), ended.told
            if mounted:
                mount(place, f"remount,size={20 * base.size}")
            again = start(place, variant)
            told += again.told
            wrong = wrong or misbehaved(again) or ("refused" if again.codes[0] else "")
            wrong = wrong or differs(base, place, ended.told)
        finally:
            if mounted:
                subprocess.run(["umount", place], check=True)
        what = f"{variant}, {'tmpfs' if mounted else 'files'} of {size:,} bytes, exit {ended.codes}"
        return Case(name, what, 0, wrong, told)


def mount(place: Path, options: str) -> bool:
    """Mount a tmpfs; False without the right to."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=130, help="cases of two to four kills")
    parser.add_argument("--damages", type=int, default=420)
    parser.add_argument("--disks", type=int, default=40)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--case", help="only this one, such as kill-3")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    sys.modules["matplotlib"] = None  # figures take longer than the run
    cache_files.PART = 8
    numbers = {"kill": options.kills, "damage": options.damages, "disk": options.disks}
    names = [f"{kind}-{n}" for kind, total in numbers.items() for n in range(total)]
    found, begin = [], time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        chaos = Chaos(Path(root), options.seed, options.variants)
        chaos.prepare()
        with ProcessPoolExecutor(options.workers, get_context("fork")) as pool:
            for case in pool.map(chaos.case, [options.case] if options.case else names):
                found.append(case)
                if case.failure or options.case:
                    print(f"{case.name}: {case.failure or 'passed'} ({case.done})")
                    print(case.told, flush=True)
    kinds = Counter(case.name.split("-")[0] for case in found)
    refused = sum(case.done.endswith(": refused") for case in found)
    failed = sum(bool(case.failure) for case in found)
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(
        f"seed {options.seed}: {sum(case.kills for case in found)} kills in {kinds['kill']} cases, "
        f"{kinds['damage']} damages ({refused} refused), {kinds['disk']} disks: {failed} failures "
        f"in {time.perf_counter() - begin:.0f} s; {about}"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
