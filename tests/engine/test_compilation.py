import torch

from benchmarks.memory import model_shape
from notus.engine.compilation import compile_repeatably
from notus.model.mistral import Block, rope_tables


def test_a_first_row_as_long_as_another_dimension_is_no_special_case():
    """128 slots, hidden numbers and head dimensions: one compilation for this and other lengths."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_repeatably()
    shape = model_shape(layers=1, hidden=128, inner=128, heads=4, vocabulary=8)
    block = Block(shape)
    forward = torch.compile(block.forward, dynamic=True, backend=backend)
    for slots in (128, 256, 384):
        rope = rope_tables(shape, torch.arange(slots))
        forward(torch.zeros(slots, 128), rope, torch.ones(slots, slots, dtype=torch.bool).tril())
    assert len(graphs) == 1
    torch._dynamo.reset()
