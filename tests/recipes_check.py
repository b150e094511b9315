"""The effects of the diffs of docs/recipes.md, checked in the copy that they were applied to.

Not a test itself: tests/test_docs.py runs it there, `python recipes_check.py CONFIG OUTPUT_DIR`.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import train
from notus.data.packing import Layout
from notus.data.planning import Plan
from notus.model.attention import may_attend
from notus.model.hf_config import read_shape
from notus.model.mistral import Block
from notus.objective.loss import build_loss
from notus.objective.losses import PairLogProbs, Sums

assert Path(train.__file__).parent == Path(__file__).parent, "this is not the copy"

# The loss: ln 2 where policy and reference agree, and its formula elsewhere.
loss = build_loss({"name": "cauchy", "beta": 0.2})
zeros = torch.zeros(2, dtype=torch.float64)
chosen = torch.tensor([0.0, 1.5], dtype=torch.float64)
pairs = PairLogProbs(
    policy=Sums(chosen=chosen, rejected=zeros, chosen_shared=chosen, rejected_shared=zeros),
    reference=Sums(zeros, zeros, zeros, zeros),
    chosen_length=zeros + 2,
    rejected_length=zeros + 2,
    mean_chosen_length=zeros[0] + 2,
)
expected = [math.log(2), -math.log(0.5 + math.atan(0.2 * 1.5) / math.pi)]
torch.testing.assert_close(loss(pairs), torch.tensor(expected, dtype=torch.float64))

# The order: from short to long in the first epoch, every pair once; not so in the second.
lengths = np.random.default_rng(0).integers(10, 90, 50)
plan = Plan(
    lengths,
    pairs_per_step=8,
    epochs=2,
    max_steps=None,
    seed=0,
    shuffle=True,
    ranks=1,
    budget=100,
)
epochs = [
    np.concatenate([plan.pairs_of(e * plan.steps_per_epoch + s) for s in range(7)]) for e in (0, 1)
]
assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
assert (np.diff(lengths[epochs[0]]) >= 0).all() and (np.diff(lengths[epochs[1]]) < 0).any()

# The mask: two documents, each a prompt of two slots, a chosen and a rejected response of two.
prompt, first, second = 0, 1, 2
branch = torch.tensor([prompt, prompt, first, first, second, second] * 2)
layout = Layout(
    document=torch.tensor([0] * 6 + [1] * 6),
    branch=branch,
    position=torch.tensor([0, 1, 2, 3, 2, 3] * 2),
    hidden=torch.zeros(12, dtype=torch.bool),
)
slots = torch.arange(12)
seen = may_attend(layout, slots[:, None], slots[None, :], None)
by_hand = torch.tensor(
    [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
).bool()
assert torch.equal(seen, torch.block_diag(by_hand, by_hand).bool())


# The model: 6 x and not 3 x + 3 (3 x), as one after the other would give.
class Times(nn.Module):
    """A stand-in for a part of the block."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x_TD: Tensor, *others: object) -> Tensor:
        return self.factor * x_TD


configuration, output = Path(sys.argv[1]), Path(sys.argv[2])
policy = json.loads(configuration.read_text())["model"]["policy"]
block = Block(read_shape(Path(policy)))
block.self_attn, block.mlp = Times(2.0), Times(3.0)
block.input_layernorm, block.post_attention_layernorm = nn.Identity(), nn.Identity()
x_TD = torch.randn(3, 4)
torch.testing.assert_close(block(x_TD, None, None), 6 * x_TD)

# With all diffs at once a run still trains, and the loss starts at its documented value.
keys = ["loss.name=cauchy", "loss.beta=0.2", f"output_dir={output}"]
assert train.main([str(configuration), *keys]) == 0
first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
assert abs(first["eval_loss"] - math.log(2)) < 1e-5, first
