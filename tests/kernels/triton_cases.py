"""The Triton kernels against float64; test_triton.py runs this file where they can run.

That is in Triton's interpreter (TRITON_INTERPRET=1 before Python starts) or on a CUDA GPU.

Tolerance: |float64 - ours| <= |float64 - eager| + eps, in the root mean square over all entries
and, with one more rounding of the largest entry, in the worst of them. Eager is PyTorch's own
operations: for log-probs on float32 copies of the inputs, for gradients in the inputs' dtype. eps
is what float32 sums of n products lose in expectation, sqrt(n) 2^-24 times the sum of the products'
sizes: it covers that eager may sum in a luckier order.
"""

import math

import pytest
import torch
from profiled import peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from notus.kernels import linear_log_probs as triton_kernels
from notus.kernels import reference
from notus.kernels.dispatch import linear_log_probs, linear_log_sum_squares
from notus.model.mistral import LogProbHead

DEVICE = "cpu" if triton_kernels.INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16)
UNIT = 2**-24
# rows, vocabulary, hidden size: more than one tile of each, and multiples of none
SHAPES = [(1, 300, 48), (130, 700, 80), (70, 512, 64), (3, 37, 16)]


def inputs(S, V, D, dtype, largest_logit=8.0):
    """Random rows, weight and upstream gradient; targets with repeats and both ends."""
    where = {"generator": torch.Generator(DEVICE).manual_seed(S), "device": DEVICE}
    hidden = torch.randn(S, D, dtype=torch.float64, **where)
    weight = torch.randn(V, D, dtype=torch.float64, **where)
    hidden *= largest_logit / (hidden @ weight.T).abs().max()
    targets = torch.randint(0, V, (S,), **where)
    targets[:5] = torch.tensor([0, V - 1, V // 2, V // 2, 0])[:S]
    upstream = torch.randn(S, **where)
    leaves = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return *leaves, targets, upstream


def eager(hidden, weight, targets):
    """The same in PyTorch's operations, in the dtype given: logits stored and rounded to it."""
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def double(hidden, weight):
    return (x.detach().double().requires_grad_() for x in (hidden, weight))


def assert_as_good(ours, eager, truth, eps):
    """The module's tolerance; also that nothing is missing."""
    assert ours.isfinite().all()
    error, theirs = ((x.double() - truth).abs() for x in (ours, eager))
    assert rms(error) <= rms(theirs) + eps
    rounding = torch.finfo(ours.dtype).eps / 2 * truth.abs().max()
    assert error.max() <= theirs.max() + eps + rounding


def rms(x):
    return x.square().mean().sqrt()


def check(hidden, weight, targets, upstream):
    """Log-probs and both gradients, within the module's tolerance."""
    (S, D), V = hidden.shape, len(weight)
    exact_hidden, exact_weight = double(hidden, weight)
    truth = eager(exact_hidden, exact_weight, targets)
    exact = torch.autograd.grad(truth @ upstream.double(), (exact_hidden, exact_weight))
    with torch.no_grad():
        sizes = (exact_hidden.abs() @ exact_weight.abs().T).max().item()
        slope = -(exact_hidden @ exact_weight.T).softmax(-1)
        slope[torch.arange(S), targets] += 1
        slope = (slope * upstream[:, None].double()).abs()
        hidden_sizes = (slope @ exact_weight.abs()).max().item()
        weight_sizes = (slope.T @ exact_hidden.abs()).max().item()
    logit_eps = math.sqrt(D) * UNIT * sizes

    ours = linear_log_probs(hidden, weight, targets, "triton")
    assert ours.dtype == torch.float32 and ours.shape == (S,)
    widened = eager(hidden.detach().float(), weight.detach().float(), targets)
    assert_as_good(ours, widened, truth, logit_eps)
    with torch.no_grad():
        assert torch.equal(linear_log_probs(hidden, weight, targets, "triton"), ours)

    gradients = torch.autograd.grad(ours @ upstream, (hidden, weight))
    theirs = torch.autograd.grad(
        (eager(hidden, weight, targets).float() @ upstream), (hidden, weight)
    )
    scales = (
        (math.sqrt(V) * UNIT + logit_eps) * hidden_sizes,
        (math.sqrt(S) * UNIT + logit_eps) * weight_sizes,
    )
    for mine, other, true, eps in zip(gradients, theirs, exact, scales, strict=True):
        assert mine.dtype == hidden.dtype
        assert_as_good(mine, other, true, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_gradients(shape, dtype):
    check(*inputs(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest_logit", [0.0, 1e4])
def test_equal_and_huge_logits(largest_logit, dtype):
    check(*inputs(20, 300, 48, dtype, largest_logit))


def test_huge_logits_lose_nothing_when_they_are_exact():
    """Products without rounding: log-probs of nearby logits around 1e4, to a few units of 1e-7."""
    hidden = torch.zeros(2, 16, device=DEVICE)
    hidden[:, 0] = 1
    weight = torch.zeros(300, 16, device=DEVICE)
    weight[:, 0] = 1e4 + torch.arange(300, device=DEVICE) % 7 / 4
    hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.tensor([3, 7], device=DEVICE)
    exact_hidden, exact_weight = double(hidden, weight)
    truth = eager(exact_hidden, exact_weight, targets)
    ours = linear_log_probs(hidden, weight, targets, "triton")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    found = torch.autograd.grad(ours.sum(), weight)[0]
    expected = torch.autograd.grad(truth.sum(), exact_weight)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart(dtype):
    hidden, weight, targets, upstream = inputs(18, 300, 48, dtype)
    check(hidden.detach()[::2].requires_grad_(), weight, targets[::2], upstream[::2].clone())
    transposed = hidden.detach().T.contiguous().T.requires_grad_()
    check(transposed, weight, targets, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_a_split_and_chunks_of_rows(dtype, monkeypatch):
    monkeypatch.setattr(triton_kernels, "MAX_SPLITS", 2)
    monkeypatch.setattr(triton_kernels, "MIN_PROGRAMS", 1)
    monkeypatch.setattr(triton_kernels, "CHUNK_ROWS", 128)
    check(*inputs(150, 700, 48, dtype))
    check_log_sum_squares(150, 700, 48, dtype)


def test_more_blocks_of_rows_than_a_group_of_programs(monkeypatch):
    """19 blocks in groups of 16: the last group is a short one."""
    monkeypatch.setattr(triton_kernels, "FLOAT32", triton_kernels.Tiles(16, 64, 32, 4, 2))
    check(*inputs(300, 130, 16, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows(dtype):
    hidden, weight, targets, upstream = inputs(3, 37, 16, dtype)
    hidden = hidden.detach()[:0].requires_grad_()
    log_probs = linear_log_probs(hidden, weight, targets[:0], "triton")
    assert log_probs.shape == (0,) and log_probs.dtype == torch.float32
    grad_hidden, grad_weight = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    assert grad_hidden.shape == (0, 16) and not grad_weight.any()
    assert linear_log_sum_squares(hidden, weight, "triton").shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen, dtype):
    hidden, weight, targets, upstream = inputs(20, 300, 48, dtype)
    both = torch.autograd.grad(
        linear_log_probs(hidden, weight, targets, "triton") @ upstream, (hidden, weight)
    )
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    (linear_log_probs(hidden, weight, targets, "triton") @ upstream).backward()
    assert (hidden if frozen == "hidden" else weight).grad is None
    free, index = (weight, 1) if frozen == "hidden" else (hidden, 0)
    assert torch.equal(free.grad, both[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_squares(shape, dtype):
    check_log_sum_squares(*shape, dtype)


def check_log_sum_squares(S, V, D, dtype):
    hidden, weight, _, _ = inputs(S, V, D, dtype)
    exact_hidden, exact_weight = double(hidden, weight)
    logits = (exact_hidden @ exact_weight.T).detach()
    truth = logits.softmax(-1).square().sum(-1).log()
    theirs = (hidden.float() @ weight.float().T).softmax(-1).square().sum(-1).log()
    sizes = (exact_hidden.abs() @ exact_weight.abs().T).max().item()
    ours = linear_log_sum_squares(hidden, weight, "triton")
    assert not ours.requires_grad
    assert_as_good(ours, theirs, truth, 2 * math.sqrt(D) * UNIT * sizes)


def test_a_target_out_of_range_gives_nan_and_nothing_else_does():
    """What a caller sees on CUDA, where nobody looks at the targets before the kernel does."""
    hidden, weight, targets, _ = inputs(20, 300, 48, torch.float32)
    expected = triton_kernels.linear_log_probs(hidden, weight, targets)
    targets[3], targets[7] = 300, -1
    found = triton_kernels.linear_log_probs(hidden, weight, targets)
    assert found.isnan().nonzero().flatten().tolist() == [3, 7]
    inside = ~found.isnan()
    assert torch.equal(found[inside], expected[inside])


def test_bfloat16_logit_gradients_are_the_nearest():
    """The interpreter truncates to bfloat16, which would double the error, all one way."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(70, 300, generator=generator).to(DEVICE)
    targets = torch.randint(0, 300, (70,), generator=generator).to(DEVICE)
    upstream = torch.randn(70, generator=generator).to(DEVICE)
    largest, log_total = logits.amax(1), (logits - logits.amax(1, keepdim=True)).exp().sum(1).log()
    truth = -logits.double().softmax(-1)
    truth[torch.arange(70), targets] += 1
    truth *= upstream[:, None].double()
    ours = triton_kernels._write_logit_gradient(
        logits, targets, torch.stack((largest, log_total)), upstream, torch.bfloat16
    )
    assert ours.data_ptr() == logits.data_ptr()
    error = (ours.double() - truth).abs() / truth.abs()
    assert error.max() <= 2**-8 * 1.01


@pytest.mark.parametrize("trained", ["none", "hidden", "both"])
def test_flops(trained):
    hidden, weight, targets, _ = inputs(20, 300, 48, torch.float32)
    weight.requires_grad_(trained == "both")
    hidden.requires_grad_(trained != "none")
    with FlopCounterMode(display=False) as counter:
        log_probs = linear_log_probs(hidden, weight, targets, "triton")
        if trained != "none":
            log_probs.sum().backward()
    assert counter.get_total_flops() == {"none": 2, "hidden": 6, "both": 8}[trained] * 20 * 48 * 300


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the CPU's allocations")
def test_memory_is_one_chunk_of_logits(monkeypatch):
    """Beyond the gradients, and beyond what one row adds: its own gradient and statistics."""
    monkeypatch.setattr(triton_kernels, "CHUNK_ROWS", 128)
    monkeypatch.setattr(triton_kernels, "FLOAT32", triton_kernels.Tiles(128, 2048, 32, 4, 2))
    V, D, extra = 8192, 32, {}
    for rows in (256, 512):
        hidden, weight, targets, upstream = inputs(rows, V, D, torch.float32)

        def step(hidden=hidden, weight=weight, targets=targets, upstream=upstream):
            log_probs = linear_log_probs(hidden, weight, targets, "triton")
            return torch.autograd.grad(log_probs @ upstream, (hidden, weight))

        extra[rows] = peak_bytes(step)
    assert (extra[256] - V * D * 4) / (128 * V * 4) <= 1.3
    statistics = 4 * (3 + 3 * triton_kernels.MAX_SPLITS)
    assert extra[512] - extra[256] <= 256 * (2 * D * 4 + statistics)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_gives_the_plain_loss_and_gradient(dtype, tiny_model):
    """Through the module, log sum p^2 included, as a training step calls it."""
    V, D = tiny_model.lm_head.weight.shape
    found = {}
    for kernels in ("triton", "plain"):
        head = LogProbHead(tiny_model.shape, kernels).to(DEVICE, dtype)
        head.load_state_dict(tiny_model.lm_head.state_dict())
        hidden, _, targets, upstream = inputs(40, V, D, dtype)
        values = head(hidden, targets, sum_squares=True)
        (values[0] @ upstream).backward()
        found[kernels] = (values, hidden.grad, head.weight.grad)
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(found["triton"][0], found["plain"][0], rtol=1e-5, atol=1e-5)
    for ours, plain in zip(found["triton"][1:], found["plain"][1:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=unit, atol=unit * plain.abs().max().item())


@pytest.mark.skipif(DEVICE != "cuda", reason="full size, on a GPU")
@pytest.mark.parametrize("V", [32000, 32003, 128256])
def test_full_size_equals_the_plain_definition_and_itself(V):
    hidden, weight, targets, upstream = inputs(2500, V, 4096, torch.bfloat16, 30.0)
    first = linear_log_probs(hidden, weight, targets, "triton")
    gradients = torch.autograd.grad(first @ upstream, (hidden, weight))
    again = linear_log_probs(hidden, weight, targets, "triton")
    assert torch.equal(first, again)
    for one, two in zip(
        gradients, torch.autograd.grad(again @ upstream, (hidden, weight)), strict=True
    ):
        assert torch.equal(one, two)
    plain = reference.linear_log_probs(hidden, weight, targets)
    # Matrix units lose a little more than float32 sums do, the library's as well as ours.
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=2e-3)
    exact = torch.autograd.grad(plain @ upstream, (hidden, weight))
    for ours, theirs in zip(gradients, exact, strict=True):
        bound = 2**-7 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=bound)
