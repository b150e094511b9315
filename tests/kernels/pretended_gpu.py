"""A 7B-wide block compiled for a pretended GPU: Inductor and ptxas do their work, nothing runs.

    python -m tests.kernels.pretended_gpu FOLDER ARCHITECTURE (none|selective|full|lora)

For PyTorch's CUDA build on a machine without a GPU; architecture: 80 or 90. A process of its own,
as it replaces parts of torch.cuda. FOLDER is for the compilers' files. Prints JSON: `compilations`,
of the block for rows of each length of ROWS; `kernels`, of FlexAttention: [name, registers of a
thread, bytes of a thread's local memory, bytes of shared memory].
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROWS = (4096, 128, 256, 1152, 8192, 16384)
# Stands in for the driver. The autograd engine asks for the devices, and whether they are in use.
DRIVER = """
int count;
signed char _ZN3c104cuda12device_countEv(void) { return count; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return *flags = *active = 0;
}
"""


def restart(driver: Path) -> None:
    """Start this program again, with the driver loaded before all else."""
    source = driver.with_name("driver.c")
    source.write_text(DRIVER)
    name = f"-Wl,-soname,{driver.name}"
    subprocess.run(["cc", "-shared", "-fPIC", name, source, "-o", driver], check=True)
    caches = {f"{name}_CACHE_DIR": str(driver.parent) for name in ("TRITON", "TORCHINDUCTOR")}
    own = {"LD_PRELOAD": str(driver), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    program = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
    os.execve(sys.executable, program, os.environ | caches | own)


def pretend(driver: Path, architecture: int) -> list:
    """Make torch believe in one GPU; returns the list that Inductor's kernels will be added to."""
    import torch
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver as triton_driver

    torch._C._ensureCUDADeviceGuardSet()  # while no device is found: a guard that does nothing
    ctypes.c_int.in_dll(ctypes.CDLL(str(driver)), "count").value = 8
    major, minor = divmod(architecture, 10)
    properties = SimpleNamespace(
        name="pretended",
        major=major,
        minor=minor,
        multi_processor_count={80: 108, 90: 132}[architecture],
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin={80: 163 << 10, 90: 227 << 10}[architecture],
        L2_cache_size=50 << 20,
        gcnArchName="",
    )
    cuda = torch._dynamo.device_interface.CudaInterface
    for place in (torch.cuda, cuda, cuda.Worker):
        place.get_device_properties = staticmethod(lambda device=None: properties)
        place.current_device = staticmethod(lambda: 0)
    torch.cuda.get_device_capability = lambda device=None: (major, minor)
    torch.cuda.is_available = lambda: True
    torch.cuda._exchange_device = lambda device: 0
    torch.cuda._maybe_exchange_device = lambda device: 0  # Dynamo tells the two apart
    torch.cuda._lazy_init = fake_tensor.init_gpu_context = lambda *_: None
    torch.cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    joint_graph.lazy_init = lambda *_: None  # patterns of dense attention, traced on a real device
    triton_helpers.set_driver_to_gpu = lambda: None
    target = GPUTarget("cuda", architecture, 32)
    triton_driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    kernels: list = []
    CachingAutotuner.precompile = lambda kernel, *_, **__: kernels.append(kernel)
    return kernels


def main(folder: Path, architecture: int, mode: str) -> None:
    driver = folder / "libcuda.so.1"
    if "LD_PRELOAD" not in os.environ:
        restart(driver)
    del os.environ["LD_PRELOAD"]  # of no use to the programs started from here

    import torch
    import triton
    from torch._inductor.compile_fx import compile_fx

    from benchmarks.memory import model_shape
    from notus.data.packing import Layout
    from notus.engine.compilation import compile_repeatably
    from notus.engine.distributed import _recomputed
    from notus.model import lora
    from notus.model.attention import build_mask, may_attend
    from notus.model.intervals import agrees
    from notus.model.mistral import MistralForCausalLM, rope_tables

    kernels = pretend(driver, architecture)
    compile_repeatably()
    assert agrees(may_attend, None)  # with numbers, which the tensors below do not have
    shape = model_shape(layers=1, hidden=4096, inner=14336, heads=32, vocabulary=8)
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        compile_fx(graph, inputs)  # forward and backward; their guards become those of the block
        return graph.forward

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda:0"):
            torch.set_default_dtype(torch.bfloat16)
            model = MistralForCausalLM(shape)
            torch.set_default_dtype(torch.float32)
            if mode == "lora":
                lora.add_adapters(model, lora.LoraSettings(rank=16, alpha=16.0))
        forward = model.model.layers[0].forward
        if mode in ("selective", "full"):
            forward = _recomputed(forward, mode, False)
        forward = torch.compile(forward, dynamic=True, backend=backend)
        for slots in ROWS:
            with torch.device("cuda:0"):
                document, branch, position, *intervals = torch.zeros(6, slots, dtype=torch.int32)
                hidden = torch.zeros(slots, dtype=torch.bool)
                layout = Layout(document, branch, position, hidden, None, torch.stack(intervals))
                x = torch.zeros(slots, 4096, dtype=torch.bfloat16, requires_grad=True)
                row = x, rope_tables(shape, position), build_mask(layout, None, "flex")
            forward(*row)
    for kernel in kernels:
        if "flex_attention" in kernel.fn.__name__:
            for config in kernel.configs:
                kernel._precompile_config(config)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = []
    for binary in folder.glob("*/triton_tem_*.cubin"):
        usage = subprocess.check_output([tool, "-res-usage", binary], text=True)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        shared = json.loads(binary.with_suffix(".json").read_text())["shared"]
        found.append((binary.stem, registers, stack, shared))
    print(json.dumps({"compilations": compilations, "kernels": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
