"""Runs triton_cases.py where Triton runs: in its interpreter on the CPU, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import needs_interpreter

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(**environment: str) -> str:
    """In a process of its own, because Triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(CASES)],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_interpreter
def test_in_the_interpreter():
    assert "failed" not in run_cases(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and NOTUS_TEST_GPU=1")
def test_on_the_gpu():
    assert "failed" not in run_cases(TRITON_INTERPRET="0")
