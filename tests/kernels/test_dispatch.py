"""Who computes what, and what a wrong argument is told."""

import importlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import notus
from notus.errors import UserError
from notus.kernels import dispatch
from notus.kernels.dispatch import check_backend, linear_log_probs, linear_log_sum_squares


@pytest.fixture
def arguments():
    return {
        "hidden_SD": torch.ones(3, 16),
        "weight_VD": torch.ones(7, 16),
        "targets_S": torch.tensor([0, 6, 3]),
    }


@pytest.mark.parametrize("backend", ["auto", "plain"])
def test_the_cpu_takes_the_plain_definition(arguments, backend):
    expected = torch.full((3,), 1 / 7).log()
    torch.testing.assert_close(linear_log_probs(**arguments, backend=backend), expected)
    arguments.pop("targets_S")
    torch.testing.assert_close(linear_log_sum_squares(**arguments, backend=backend), expected)


def test_cuda_takes_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "check_backend", lambda backend, device: None)
    monkeypatch.setattr(dispatch, "_triton", lambda: "triton")
    for backend, device, expected in [
        ("auto", "cuda", "triton"),
        ("triton", "cpu", "triton"),
        ("plain", "cuda", dispatch.reference),
    ]:
        assert dispatch._kernels(backend, torch.device(device)) == expected


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight_VD": torch.ones(7, 32)}, ("[3, 16]", "[7, 32]", "the same D")),
        ({"hidden_SD": torch.ones(1, 3, 16)}, ("[1, 3, 16]", "[S, D]")),
        ({"weight_VD": torch.ones(7, 16).bfloat16()}, ("torch.bfloat16", "cast one with .to()")),
        ({"hidden_SD": torch.ones(3, 16).half(), "weight_VD": torch.ones(7, 16).half()},
         ("torch.float16", "both in bfloat16 or both in float32")),
        ({"weight_VD": torch.ones(7, 16, device="meta")}, ("cpu", "meta", "expected one device")),
        ({"targets_S": torch.tensor([0, 7, 3])}, ("found target 7", "expected 0 to 6")),
        ({"targets_S": torch.tensor([0, -100, 3])}, ("found target -100", "leave rows without")),
        ({"targets_S": torch.tensor([0, 1])}, ("targets [2]", "expected [3]")),
        ({"targets_S": torch.tensor([0, 1, 2]).int()}, ("torch.int32", "torch.int64")),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(arguments, changed, words):
    with pytest.raises(ValueError) as error:
        linear_log_probs(**arguments | changed)
    for word in words:
        assert word in str(error.value)


def test_a_sharded_weight_is_refused(arguments):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        arguments["weight_VD"] = distribute_tensor(arguments["weight_VD"], mesh)
        with pytest.raises(ValueError, match=r"DTensor.*full_tensor\(\)"):
            linear_log_probs(**arguments)
    finally:
        dist.destroy_process_group()


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    check_backend.cache_clear()
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(UserError, match='found "cuda", expected one of auto, triton, plain'):
        check_backend("cuda", cpu)
    if dispatch.find_spec("triton") is not None:
        with pytest.raises(UserError, match='device cpu; use "auto" or "plain".*INTERPRET=1'):
            check_backend("triton", cpu)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match='8.0 .* or newer, found 7.5; use "plain"'):
        check_backend("auto", cuda)
    check_backend("plain", cuda)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='"triton" on cpu needs Triton, which is not installed'):
        check_backend("triton", cpu)
    check_backend.cache_clear()


def test_the_plain_definition_needs_no_triton(monkeypatch):
    """As on macOS, where the package does not exist."""
    monkeypatch.setattr(notus, "kernels", notus.kernels)  # importing it anew sets this
    for name in [name for name in sys.modules if name.startswith("notus.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    fresh = importlib.import_module("notus.kernels.dispatch")
    assert fresh is not dispatch
    x = torch.ones(2, 4)
    found = fresh.linear_log_probs(x, x, torch.tensor([0, 1])).exp()
    assert found.tolist() == [0.5, 0.5]
