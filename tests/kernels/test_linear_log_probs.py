"""The plain linear + log-softmax against float64 and autograd, with chunks that do not divide."""

import pytest
import torch
from profiled import peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from notus.kernels import reference
from notus.kernels.reference import linear_log_probs, linear_log_sum_squares

V, D = 37, 16


def inputs(rows, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(rows, D, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, V - 1])[:rows]
    return hidden, weight, targets


def plain(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1)[torch.arange(len(targets)), targets]


@pytest.fixture(params=[1, 5, 1000])
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_LOGITS", request.param * V)


@pytest.mark.parametrize("rows", [0, 1, 4, 12])
def test_values_and_gradients_are_those_of_autograd(rows, chunk_rows):
    hidden, weight, targets = inputs(rows)
    upstream = torch.randn(rows, dtype=torch.float64)
    expected = plain(hidden, weight, targets)
    gradients = torch.autograd.grad(expected @ upstream, (hidden, weight))
    log_probs = linear_log_probs(hidden, weight, targets)
    assert log_probs.dtype == torch.float64
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(log_probs @ upstream, (hidden, weight))
    torch.testing.assert_close(ours, gradients, rtol=1e-12, atol=1e-12)


def test_gradcheck(chunk_rows):
    hidden, weight, targets = inputs(6)
    assert torch.autograd.gradcheck(lambda h, w: linear_log_probs(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen, chunk_rows):
    hidden, weight, targets = inputs(6)
    expected = torch.autograd.grad(plain(hidden, weight, targets).sum(), (hidden, weight))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    linear_log_probs(hidden, weight, targets).sum().backward()
    free, index = (weight, 1) if frozen == "hidden" else (hidden, 0)
    assert (hidden if frozen == "hidden" else weight).grad is None
    torch.testing.assert_close(free.grad, expected[index], rtol=1e-12, atol=1e-12)


def test_bfloat16_inputs_give_float32_log_probs_of_the_rounded_inputs(chunk_rows):
    hidden, weight, targets = inputs(12, torch.bfloat16)
    log_probs = linear_log_probs(hidden, weight, targets)
    assert log_probs.dtype == torch.float32
    truth = plain(hidden.double(), weight.double(), targets)
    # Eager rounds the logits to bfloat16: the bound that any other order must stay far below.
    eager = (plain(hidden, weight, targets).double() - truth).abs().max()
    error = (log_probs.double() - truth).abs().max()
    assert error <= 1e-5 < eager
    log_probs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = torch.autograd.grad(truth.sum(), (hidden, weight))
    for ours, theirs in zip((hidden.grad, weight.grad), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_equal_and_huge_logits_stay_finite(scale, chunk_rows):
    hidden, weight, targets = inputs(6, torch.float32, scale)
    log_probs = linear_log_probs(hidden, weight, targets)
    truth = plain(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(log_probs.double(), truth, rtol=1e-5, atol=1e-5)
    log_probs.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_huge_logits_lose_nothing_when_they_are_exact(chunk_rows):
    hidden, weight = torch.zeros(2, D), torch.zeros(V, D)
    hidden[:, 0] = 1
    weight[:, 0] = 1e4 + torch.arange(V) % 7 / 4
    weight.requires_grad_()
    targets = torch.tensor([3, 7])
    exact = weight.detach().double().requires_grad_()
    truth, ours = plain(hidden.double(), exact, targets), linear_log_probs(hidden, weight, targets)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)
    truth.sum().backward(), ours.sum().backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)


def test_log_sum_squares(chunk_rows):
    hidden, weight, _ = inputs(12)
    expected = (hidden @ weight.T).softmax(-1).square().sum(-1).log()
    ours = linear_log_sum_squares(hidden, weight)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-12, atol=1e-12)
    assert not ours.requires_grad


@pytest.mark.parametrize("trained", ["none", "hidden", "both"])
def test_flops(trained):
    hidden, weight, targets = inputs(6, torch.float32)
    weight.requires_grad_(trained == "both")
    hidden.requires_grad_(trained != "none")
    with FlopCounterMode(display=False) as counter:
        log_probs = linear_log_probs(hidden, weight, targets)
        if trained != "none":
            log_probs.sum().backward()
    assert counter.get_total_flops() == {"none": 2, "hidden": 6, "both": 8}[trained] * 6 * D * V


def test_memory_grows_with_chunk_times_vocabulary(monkeypatch):
    chunk, D, extra = 64, 32, {}
    for rows, V in ((256, 4096), (512, 4096), (256, 16384)):
        monkeypatch.setattr(reference, "CHUNK_LOGITS", chunk * V)
        hidden = torch.randn(rows, D, requires_grad=True)
        weight = torch.randn(V, D, requires_grad=True)
        targets = torch.randint(0, V, (rows,))

        def step(hidden=hidden, weight=weight, targets=targets):
            loss = linear_log_probs(hidden, weight, targets).sum()
            return torch.autograd.grad(loss, (hidden, weight))

        extra[rows, V] = peak_bytes(step)
        assert (extra[rows, V] - V * D * 4) / (chunk * V * 4) <= 1.3
    statistics = 8 * 4  # float32 values a row
    assert extra[512, 4096] - extra[256, 4096] <= 256 * (2 * D * 4 + statistics)


def test_no_gradient_needs_one_chunk(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 64 * 4096)
    hidden, weight = torch.randn(256, 32), torch.randn(4096, 32)
    targets = torch.zeros(256, dtype=torch.int64)
    for compute in (
        lambda: linear_log_probs(hidden, weight, targets),
        lambda: linear_log_sum_squares(hidden, weight),
    ):
        assert peak_bytes(compute) <= 1.3 * 64 * 4096 * 4
