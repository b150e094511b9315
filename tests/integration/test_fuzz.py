"""Whatever a file holds, a command ends with exit code 0 or 2, one message, and nothing left over.

It takes at most 20 seconds and 2 GB.

NOTUS_FUZZ=SECONDS spoils each kind of file for so long, at random; else it is a fixed few times.
"""

import os
import time
from random import Random

import datasets
import fuzzing
import huggingface_hub
import pytest
from fuzzing import TARGETS, attempt, write_place
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = 15
SECONDS = float(os.environ.get("NOTUS_FUZZ", 0))


@pytest.fixture(scope="module")
def place(demo, tmp_path_factory):
    """The working directory, with one sound file of each kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_place(demo, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield folder


def test_memory_is_measured_at_its_highest(place, monkeypatch):
    monkeypatch.setattr(fuzzing, "MEMORY", 2**27)
    template = TARGETS["template"]._replace(spoil=lambda rng, content: b"{{ ('a' * 2**28)[:1] }}")
    seed = next(seed for seed in range(99) if Random(seed).randrange(40) > 2)
    with pytest.raises(AssertionError, match="bytes of memory"):
        attempt(template, Random(seed))


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_files_are_refused_or_read(name, place):
    assert attempt(TARGETS[name], None) == 0  # the sound one

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32 - 1))
    def spoil(seed):
        attempt(TARGETS[name], Random(seed))

    spoil()
    seed, end = time.time_ns() % 2**32, time.monotonic() + SECONDS
    while time.monotonic() < end:
        seed += 1
        try:
            attempt(TARGETS[name], Random(seed))
        except BaseException as error:
            error.add_note(f"{name}: Random({seed})")
            raise
