"""Ranks and memory, as far as one process can show them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import model_shape
from notus.engine.distributed import Ranks, check_host_memory, compile_repeatably
from notus.errors import UserError
from notus.model.mistral import Block, rope_tables

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_seven_billion_parameters_do_not_train_on_a_small_host(monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**30 // 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    # 12 bytes x 7,241,732,096 = 80.9 GiB
    with pytest.raises(UserError, match="no CUDA device.*at least 81 GiB of this machine's 24 GiB"):
        check_host_memory(7_241_732_096, Ranks(0, 1, CPU))
    check_host_memory(2_000_000_000, Ranks(0, 1, CPU))
    check_host_memory(7_241_732_096, Ranks(0, 1, GPU))


def test_only_this_machine_s_share_counts(monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 24 * 2**30 // 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_host_memory(7_241_732_096, Ranks(0, 8, CPU))
    with pytest.raises(UserError, match="40 GiB"):
        check_host_memory(7_241_732_096, Ranks(0, 4, CPU))


@pytest.mark.parametrize(("rank", "printed"), [(0, "once\n"), (1, "")])
def test_only_the_first_rank_prints(rank, printed, capsys):
    Ranks(rank, 2, CPU).say("once")
    assert capsys.readouterr().out == printed


LATE_THREAD = """
import threading, time
from notus.engine import distributed

def let_go():
    time.sleep(0.1)
    print("let go", flush=True)

distributed.SECONDS_AT_EXIT *= 10  # this thread itself may come late
distributed.start("cpu")
threading.Thread(target=let_go, daemon=True).start()
distributed.stop()
"""


def test_a_late_thread_still_finds_python_at_the_end():
    """One of gloo's can be late; without the wait the process would be gone."""
    done = subprocess.run(
        [sys.executable, "-c", LATE_THREAD],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "let go\n"), done.stderr


def test_a_first_row_as_long_as_another_dimension_is_no_special_case():
    """128 slots, hidden numbers and head dimensions: one compilation for this and other lengths."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_repeatably()
    shape = model_shape(layers=1, hidden=128, inner=128, heads=4, vocabulary=8)
    block = Block(shape)
    forward = torch.compile(block.forward, dynamic=True, backend=backend)
    for slots in (128, 256, 384):
        rope = rope_tables(shape, torch.arange(slots))
        forward(torch.zeros(slots, 128), rope, torch.ones(slots, slots, dtype=torch.bool).tril())
    assert len(graphs) == 1
    torch._dynamo.reset()
