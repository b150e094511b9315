"""Every Triton kernel compiles for the GPUs in use, without one, and keeps out of local memory.

The launches are recorded, not written out again: what is compiled is what a run would launch, for
each combination of argument types, alignments and constants that the shapes in use lead to.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from benchmarks import descriptor_head  # noqa: E402
from notus.kernels import linear_log_probs as kernels  # noqa: E402

SHAPES = [(V, D) for V in (32000, 32768, 128256, 131072) for D in (2048, 4096, 5120)]
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = ("_partial_statistics_kernel", "_merge_kernel", "_logit_gradient_kernel")
DESCRIBED = "_described_statistics_kernel"  # the benchmark's, for GPUs with large tiles
TILES = {90: kernels.LARGE}
if os.environ.get("NOTUS_TEST_ARCHS") == "all":
    TILES |= {80: kernels.SMALL, 100: kernels.LARGE}
SPILLS = {100: 16}  # bytes of a thread, in the forward kernel


class Recorder:
    """Stands in for a kernel: keeps what each launch would have to be compiled from."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, **arguments):
        signature, constants, attributes = {}, {}, {}
        for parameter in self.kernel.params:
            name, value = parameter.name, arguments.pop(parameter.name)
            aligned = isinstance(value, torch.Tensor)  # PyTorch allocates in 256 bytes
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                dtype = TYPES[value.base.dtype][1:]
                signature[name] = f"tensordesc<{dtype}{list(value.block_shape)}>"
            elif aligned:
                signature[name] = TYPES[value.dtype]
            else:
                assert type(value) is int and value < 2**31
                signature[name] = "i32"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
                assert value != 1 or parameter.do_not_specialize, "would become a constant"
            if aligned:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        key = repr((self.kernel.__name__, signature, constants, attributes, arguments))
        self.found[key] = (self.kernel, signature, constants, attributes, arguments)


def launches(monkeypatch, tiles):
    """All distinct ones of forward and backward passes, on tensors without storage."""
    found = {}
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), found))
    described = Recorder(getattr(descriptor_head, DESCRIBED), found)
    monkeypatch.setattr(descriptor_head, DESCRIBED, described)
    bfloat16 = [(torch.bfloat16, *shape) for shape in [*SHAPES, (32003, 4096)]]
    for dtype, V, D in bfloat16 + [(torch.float32, *shape) for shape in SHAPES]:
        chosen = kernels.FLOAT32 if dtype == torch.float32 else tiles
        monkeypatch.setattr(kernels, "_tiles", lambda hidden, chosen=chosen: chosen)
        hidden = torch.empty(9400, D, dtype=dtype, device="meta", requires_grad=True)
        weight = torch.empty(V, D, dtype=dtype, device="meta", requires_grad=True)
        targets = torch.empty(9400, dtype=torch.int64, device="meta")
        statistics = kernels._statistics._init_fn
        statistics(hidden, weight, targets)
        if V != 32003:
            statistics(hidden, weight, None)
        if tiles == kernels.LARGE and dtype == torch.bfloat16:
            descriptor_head._statistics(hidden, weight, targets)
        logits = torch.empty(2048, triton.cdiv(V, 64) * 64, device="meta")[:, :V]
        upstream = torch.empty(2048, device="meta")
        kernels._write_logit_gradient(
            logits, targets[:2048], torch.empty(3, 2048, device="meta"), upstream, dtype
        )
    return found.values()


@pytest.mark.parametrize("architecture", TILES)
def test_compiles_without_spills(architecture, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = set()
    lines = [f"\n{f'sm_{architecture}':<30}types      registers  spills  shared memory"]
    for kernel, signature, constants, attributes, options in launches(
        monkeypatch, TILES[architecture]
    ):
        source = ASTSource(kernel, signature, constants, attributes)
        target = GPUTarget("cuda", architecture, 32)
        binary = triton.compile(source, target=target, options=options)
        file = tmp_path / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        listing = subprocess.run(
            [CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", listing).groups())
        types = re.findall(r"[*<](\w+)", " ".join(signature.values()))
        types = ",".join(dict.fromkeys(types))
        lines.append(
            f"{kernel.__name__:<30}{types:<14}{registers:>6}  {stack:>4} B  "
            f"{binary.metadata.shared:>9} B"
        )
        # Local memory is where registers spill to; these kernels index no array at run time.
        assert stack <= SPILLS.get(architecture, 0), f"{kernel.__name__} spills: {lines[-1]}"
        assert (
            binary.metadata.shared <= {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}[architecture]
        )
        if architecture == 90 and kernel.__name__ == DESCRIBED:
            for used in ("cp.async.bulk.tensor", "wgmma.mma_async"):
                assert used in binary.asm["ptx"]
        compiled.add((kernel.__name__, types.split(",")[0]))
    # Each kernel, and the products in both dtypes, were among the launches.
    large = {DESCRIBED} if TILES[architecture] == kernels.LARGE else set()
    assert {name for name, _ in compiled} == {*KERNELS} | large
    assert {t for name, t in compiled if name.startswith("_partial")} == {"bf16", "fp32"}
    with capsys.disabled():
        print("\n".join(lines))
