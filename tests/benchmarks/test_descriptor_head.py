"""The head with tensor descriptors against the plain definition, in Triton's interpreter."""

import torch

from conftest import needs_interpreter
from ranks import call


def compare() -> int:
    """In float32: one ragged tile, full tiles, several ragged ones in two splits; odd targets."""
    from benchmarks import descriptor_head
    from notus.kernels import linear_log_probs as fused
    from notus.kernels import reference

    fused.MAX_SPLITS, fused.MIN_PROGRAMS = 2, 1
    for S, V, D in ((3, 37, 16), (64, 128, 32), (70, 300, 48)):
        generator = torch.Generator().manual_seed(S)
        hidden, weight = (torch.randn(n, D, generator=generator) / D**0.25 for n in (S, V))
        targets = torch.randint(0, V, (S,), generator=generator)
        targets[:2] = torch.tensor([0, V - 1])
        upstream = torch.randn(S, generator=generator)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        found, expected = (
            [log_probs.detach(), *torch.autograd.grad(log_probs @ upstream, leaves)]
            for log_probs in (
                module.linear_log_probs(*leaves, targets) for module in (descriptor_head, reference)
            )
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    targets[3], targets[7] = V, -1
    missing = descriptor_head.linear_log_probs(*leaves, targets).isnan()
    assert missing.nonzero().flatten().tolist() == [3, 7]
    return 0


@needs_interpreter
def test_the_plain_definition(tmp_path):
    code, told = call(compare, log=tmp_path / "log")
    assert code == 0, told
