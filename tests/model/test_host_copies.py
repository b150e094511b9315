"""Tensors copied to the host, from a GPU too: NOTUS_TEST_GPU=1 pytest -m gpu."""

import pytest
import torch

from notus.model.host_copies import HostCopies, copy_bytes


def test_a_copy_on_the_cpu():
    tensor = torch.arange(6.0).view(2, 3).T
    copies = HostCopies()
    copy = copies.add(tensor)
    copies.wait()
    expected = tensor.tolist()
    tensor.zero_()
    assert copy.tolist() == expected and copy.is_contiguous()
    assert copy_bytes(tensor) == 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and NOTUS_TEST_GPU=1")
def test_copies_from_a_gpu():
    """Each is of what the GPU has still to compute, and is complete when its source changes."""
    base = torch.randn(3000, 2000, device="cuda")
    scale = base @ base.T  # takes a while
    copies, found, sources = HostCopies(), [], []
    for number in range(6):
        sources.append((scale * number)[:, ::2] if number % 2 else (scale * number).bfloat16())
        found.append(copies.add(sources[-1]))
        temporary = torch.randn_like(scale)  # in memory that a copied tensor might have had
        del temporary
    copies.wait()
    expected = [source.cpu() for source in sources]
    for source in sources:
        source.zero_()
    torch.cuda.synchronize()
    for copy, source in zip(found, expected, strict=True):
        assert copy.is_pinned() and copy.is_contiguous() and torch.equal(copy, source)
    assert copy_bytes(torch.empty(3, 100, device="cuda")) == 2048
