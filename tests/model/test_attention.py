"""The predicate by hand, and its backends against each other."""

from dataclasses import replace

import flash_on_cpu  # noqa: F401  registers FlashAttention's operator
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from benchmarks.memory import model_shape
from conftest import random_pairs
from notus.data.packing import PADDING, Layout, pack
from notus.engine.distributed import _recomputed
from notus.errors import UserError
from notus.model import attention
from notus.model.attention import (
    AttentionMask,
    SegmentMask,
    attend,
    build_mask,
    check_segments,
    default_backend,
    may_attend,
)
from notus.model.mistral import Block, rope_tables


def layout(document, branch, position, hidden=None) -> Layout:
    size = len(document)
    return Layout(
        *(torch.tensor(x, dtype=torch.int32) for x in (document, branch, position)),
        torch.tensor(hidden or [False] * size),
    )


def test_mask_of_a_shared_pair_by_hand():
    # [p0 p1 | c2 c3 | r2] and one padding slot
    mask = build_mask(layout([1] * 5 + [-1], [0, 0, 1, 1, 2, 0], [0, 1, 2, 3, 2, 0]), None, "dense")
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_window_counts_positions_and_not_slots():
    mask = build_mask(layout([1] * 5, [0, 0, 1, 1, 2], [0, 1, 2, 3, 2]), 2, "dense")
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],  # the rejected response sees the prompt's end across the chosen one
    ]


def test_hidden_slots_have_empty_rows_and_columns():
    mask = build_mask(layout([1] * 3, [0, 0, 0], [0, 1, 2], [False, True, False]), None, "dense")
    assert mask.int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_computes_what_the_dense_mask_does(sharing, window):
    batch = pack(random_pairs(6, hide=0.1), range(6), 256, sharing)
    torch.manual_seed(0)
    q, k, v = torch.randn(256, 4, 16), torch.randn(256, 2, 16), torch.randn(256, 2, 16)
    block_mask = build_mask(batch.layout, window, "flex")
    assert isinstance(block_mask, BlockMask)
    with torch.no_grad():
        flex = attend(q, k, v, block_mask)
        dense = attend(q, k, v, build_mask(batch.layout, window, "dense"))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("flash", [False, True])
def test_segments_compute_what_the_dense_mask_does(sharing, window, responses, flash):
    """Outputs and all gradients, float64; padding is finite and gives others no gradient."""
    pairs = random_pairs(6)
    if responses == 1:
        kept = [slice(p.start, c.stop) for p, c, _ in map(pairs.parts, range(6))]
        take = torch.cat([torch.arange(k.start, k.stop) for k in kept]).numpy()
        lengths = pairs.lengths * [1, 1, 0]
        pairs = replace(
            pairs, tokens=pairs.tokens[take], hidden=pairs.hidden[take], lengths=lengths
        )
    layout = pack(pairs, range(6), 512, sharing).layout
    mask = build_mask(layout, window, "varlen")
    assert isinstance(mask, SegmentMask) and mask.masks is not None
    if flash:
        mask = replace(mask, masks=None)
    torch.manual_seed(0)
    inputs = [torch.randn(512, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2)]
    weight = torch.randn(512, 4, 8, dtype=torch.float64)
    weight[layout.document == PADDING] = 0
    found = attend(*inputs, mask)
    expected = attend(*inputs, build_mask(layout, window, "dense"))
    torch.testing.assert_close(found * weight, expected * weight, rtol=1e-12, atol=1e-12)
    assert found.isfinite().all()
    gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_row_of_padding_is_finite():
    layout = pack(random_pairs(1), [], 300, True).layout
    assert layout.segments.query_edges.tolist() == [0, 128, 256, 300]
    out = attend(*(torch.randn(300, n, 8) for n in (4, 2, 2)), build_mask(layout, None, "varlen"))
    assert out.isfinite().all()


def test_hidden_tokens_are_left_to_the_predicate():
    layout = pack(random_pairs(6, hide=0.1), range(6), 256, True).layout
    found, dense = (build_mask(layout, None, backend) for backend in ("varlen", "dense"))
    assert layout.hidden.any() and torch.equal(found, dense)


def test_a_changed_predicate_is_obeyed_in_segments(monkeypatch):
    """One that allows less, within segments; one that allows more than they hold, without them."""
    layout = pack(random_pairs(6), range(6), 512, True).layout
    q, k, v = (torch.randn(512, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    predicate = attention.may_attend

    def without_distance_2(layout, query, key, window):
        distance = layout.position[query] - layout.position[key]
        return predicate(layout, query, key, window) & (distance != 2)

    def both_responses(layout, query, key, window):
        same = layout.document[query] == layout.document[key]
        return predicate(layout, query, key, window) | same

    for changed, kind in ((without_distance_2, SegmentMask), (both_responses, Tensor)):
        plain = attend(q, k, v, build_mask(layout, None, "varlen"))
        monkeypatch.setattr(attention, "may_attend", changed)
        mask = build_mask(layout, None, "varlen")
        found, expected = (attend(q, k, v, m) for m in (mask, build_mask(layout, None, "dense")))
        monkeypatch.undo()
        assert isinstance(mask, kind) and not torch.allclose(plain, expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 5, 60])
@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("hide", [0.0, 0.1])
def test_the_predicate_as_it_is_written_is_no_error(window, sharing, hide):
    check_segments(pack(random_pairs(6, hide=hide), range(6), 512, sharing).layout, window)
    check_segments(pack(random_pairs(1), [], 300, sharing).layout, window)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sharing", [True, False])
def test_a_changed_predicate_is_an_error_where_flash_attention_would_ignore_it(
    window, sharing, monkeypatch
):
    predicate = attention.may_attend

    def less(layout, query, key, window):
        distance = layout.position[query] - layout.position[key]
        return predicate(layout, query, key, window) & (distance != 2)

    def more(layout, query, key, window):
        return predicate(layout, query, key, window) | (layout.position[key] == 0)

    def later(layout, query, key, window):
        """Within a segment only: the first two tokens of a branch see each other."""
        pair = (layout.document[query] == layout.document[key]) & (layout.position[query] == 0)
        same = layout.branch[query] == layout.branch[key]
        return predicate(layout, query, key, window) | pair & same & (layout.position[key] == 1)

    def other_window(layout, query, key, window):
        return predicate(layout, query, key, 4)

    layout = pack(random_pairs(6), range(6), 512, sharing).layout
    for changed in (less, more, later, other_window):
        monkeypatch.setattr(attention, "may_attend", changed)
        with pytest.raises(UserError, match=r"parallel\.attention: .* may_attend"):
            check_segments(layout, window)


def test_the_predicate_changes_nothing_in_place():
    """Or Inductor refuses FlexAttention's kernel on CUDA, in a lowering that the CPU never does."""
    layout = pack(random_pairs(3), range(3), 128, True).layout
    slot = torch.tensor([5])
    traced = make_fx(lambda q, k: may_attend(layout, q, k, 7))(slot, slot)
    operators = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert operators and not [str(o) for o in operators if o._schema.is_mutable]


def test_kernel_options_only_where_they_hold():
    """Whole blocks may skip the bounds checks; the tiles are for bfloat16 heads of 128."""

    def options(slots, width, dtype):
        return attention._kernel_options(torch.empty(1, 2, slots, width, dtype=dtype))

    assert options(300, 128, torch.bfloat16) is None
    assert options(256, 64, torch.bfloat16) == options(256, 128, torch.float32)
    assert options(256, 64, torch.bfloat16) == {"IS_DIVISIBLE": True}
    assert options(256, 128, torch.bfloat16)["bwd_BLOCK_N1"] == 64


def test_default_backends():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert default_backend(cuda, head_dim=128) == "flex"
    assert default_backend(cuda, head_dim=8) == "dense"
    assert default_backend(cpu, head_dim=8) == "varlen"
    assert default_backend(cpu, head_dim=128, compiled=True) == "dense"


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_compiled_blocks_as_on_cuda(backend, mode, monkeypatch):
    """Both of CUDA's backends, traced with their derivative: one graph, the dense mask's gradient.

    Rows of four lengths with other numbers of pairs. On the CPU, PyTorch forbids FlexAttention's
    derivative, which it has as a composition of other operations.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.manual_seed(0)
    shape = model_shape(layers=1, hidden=64, inner=96, heads=4, vocabulary=8)
    block = Block(shape)
    forward = block.forward
    if mode != "none":
        forward = _recomputed(block.forward, mode, dropout=False)
    torch._dynamo.reset()
    compiled = torch.compile(forward, dynamic=True, backend=count)

    def gradients(run, x: Tensor, layout: Layout, mask: AttentionMask) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_(), *block.parameters()]
        out = run(inputs[0], rope_tables(shape, layout.position), mask)
        return torch.autograd.grad(out[layout.document != PADDING].square().sum(), inputs)

    for slots, count_of_pairs in ((256, 3), (384, 5), (512, 6), (640, 8)):
        layout = pack(random_pairs(count_of_pairs), range(count_of_pairs), slots, True).layout
        x = torch.randn(slots, 64)
        mask = build_mask(layout, 7, backend)
        if backend == "varlen":
            mask = replace(mask, masks=None)
        found = gradients(compiled, x, layout, mask)
        expected = gradients(block.forward, x, layout, build_mask(layout, 7, "dense"))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max())
    assert len(graphs) == 1
    torch._dynamo.reset()
