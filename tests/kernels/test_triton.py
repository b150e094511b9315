"""Runs triton_cases.py where Triton runs: in its interpreter on the CPU, and on a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import needs_interpreter
from ranks import call

CASES = str(Path(__file__).with_name("triton_cases.py"))


@needs_interpreter
def test_in_the_interpreter(tmp_path):
    """In a process whose parent has imported Triton with TRITON_INTERPRET."""
    code, told = call(pytest.main, ["-q", "-p", "no:cacheprovider", CASES], log=tmp_path / "log")
    assert code == 0 and "passed" in told and "failed" not in told


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and NOTUS_TEST_GPU=1")
def test_on_the_gpu():
    command = [sys.executable, "-m", "pytest", "-q", CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
