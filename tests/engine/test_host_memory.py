"""The host's memory, pretended."""

from pathlib import Path

import pytest
import torch

from notus.engine.distributed import Ranks
from notus.engine.host_memory import check_host_memory, free_host_bytes
from notus.errors import UserError

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


def test_memory_within_a_control_group(tmp_path, monkeypatch):
    membership = "1:cpu:/\n0::/pod\n"
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path: membership if path == Path("/proc/self/cgroup") else read(path),
    )
    free = free_host_bytes(tmp_path)
    assert 2**20 < free < 2**50
    (tmp_path / "pod").mkdir()
    (tmp_path / "pod/memory.max").write_text("max\n")
    assert 2**20 < free_host_bytes(tmp_path) < 2**50
    (tmp_path / "pod/memory.max").write_text("1000\n")
    (tmp_path / "pod/memory.current").write_text("900\n")
    (tmp_path / "pod/memory.stat").write_text("anon 300\nfile 600\n")
    assert free_host_bytes(tmp_path) == 1000 - 900 + 600
