"""What benchmarks/memory.py says where it cannot measure; the measurement is tests/report's."""

import sys

import pytest

from benchmarks import memory


def test_without_a_gpu_it_says_what_to_give(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert "no CUDA GPU was found; --toy" in capsys.readouterr().err
