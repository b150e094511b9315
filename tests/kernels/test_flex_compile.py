"""A block with FlexAttention compiles once for all rows of a GPU, and its kernels do not spill.

PyTorch's CUDA build generates the code of the pretended GPU; see pretended_gpu.py.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ranks import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="code for CUDA needs its build of torch"),
    pytest.mark.skipif(torch.cuda.device_count() > 0, reason="the GPU would be taken for another"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="the driver's stand-in is written in C"),
]


@pytest.mark.parametrize(("architecture", "mode"), [(90, "full"), (90, "lora"), (80, "selective")])
def test_block_compiles_once_and_without_spills(architecture, mode, tmp_path, capsys):
    program = [sys.executable, "-m", "tests.kernels.pretended_gpu"]
    finished = subprocess.run(
        [*program, tmp_path, str(architecture), mode], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nsm_{architecture} {mode:<10}  registers  local memory  shared memory")
        for name, registers, stack, shared in found["kernels"]:
            which = "backward" if "backward" in name else "forward"
            print(f"{which:<16} {registers:>10} {stack:>11} B {shared:>12} B")
    assert found["compilations"] == 1
    assert {"backward" in name for name, *_ in found["kernels"]} == {True, False}
    for name, _, stack, shared in found["kernels"]:
        assert stack == 0, f"{name} spills"
        assert shared <= {80: 163 << 10, 90: 227 << 10}[architecture]
