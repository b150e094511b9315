"""The effects of the diffs of docs/recipes.md, checked in the copy that they were applied to.

Not a test itself: tests/test_docs.py runs it there, `python recipes_check.py CONFIG OUTPUT_DIR`.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import train
from notus.data.packing import CHOSEN, REJECTED, Layout
from notus.data.planning import Plan
from notus.engine.metrics import pair_metrics
from notus.model.attention import build_mask, may_attend
from notus.model.hf_config import read_shape
from notus.model.mistral import Block, MistralForCausalLM
from notus.objective.logprobs import hidden_similarity
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

# The metric: all chosen log-probs, divided by all of their tokens.
top, bottom = pair_metrics(loss(pairs), pairs, loss)["logps/chosen_per_token"]
assert top / bottom == (0.0 + 1.5) / (2 + 2)

# The loss on hidden states: the cosine of the mean states of two tokens and of one, by hand.
states = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 0.0]])  # mean of the first two: (1, 1)
cosine = hidden_similarity(states, torch.tensor([[2, 1]]))
torch.testing.assert_close(cosine, torch.tensor([1 / math.sqrt(2)]))

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

# The architecture: a causal row, through a block that computes one part after the other.
parallel = Block.forward


def one_after_the_other(self: Block, x_TD: Tensor, *others: object) -> Tensor:
    x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), *others)
    return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


Block.forward = one_after_the_other
torch.manual_seed(0)
theirs = transformers.SmolLM3ForCausalLM(
    transformers.SmolLM3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.15,
    )
).eval()
for name, parameter in theirs.named_parameters():
    if "norm" in name:  # ones would hide an error
        nn.init.normal_(parameter, mean=1.0, std=0.2)
theirs.save_pretrained(output / "smollm3")
shape = read_shape(output / "smollm3")
assert shape.no_rope_layer_interval == 4 and read_shape(Path(policy)).no_rope_layer_interval is None
ours = MistralForCausalLM(shape)
ours.load_state_dict(theirs.state_dict())
tokens, slots = torch.randint(0, 97, (23,)), torch.arange(23)
same = torch.zeros(23, dtype=torch.int32)
layout = Layout(document=same, branch=same + CHOSEN, position=slots, hidden=same.bool())
logits, _ = ours(tokens, slots, build_mask(layout, None, "dense"), slots, None)
torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], rtol=1e-5, atol=1e-5)

# With all diffs at once a run still trains, and the loss starts at its documented value.
Block.forward = parallel
runs = []
for budget in (1024, 256):
    folder = output / str(budget)
    keys = ["loss.name=cauchy", "loss.beta=0.2", f"data.tokens_per_microbatch={budget}"]
    assert train.main([str(configuration), *keys, f"output_dir={folder}"]) == 0
    runs.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
start, first, last = runs[0]
assert abs(start["eval_loss"] - math.log(2)) < 1e-5, start
# The loss on hidden states starts between 0 and its weight, and does not depend on the packing.
assert 1e-3 < first["loss"] - math.log(2) < 0.1, first
for name in ("loss", "grad_norm", "logps/chosen_per_token"):
    assert math.isclose(first[name], runs[1][1][name], rel_tol=1e-4), (name, runs)

# The log of single tokens: the last step's, whatever the packing, with the sums that are logged.
board = EventAccumulator(str(output / "1024/tensorboard")).Reload()
(event,) = board.Tensors("tokens/text_summary")
lines = event.tensor_proto.string_val[0].decode().splitlines()
assert event.step == 2 and all(re.match(r"`[+-]\d+\.\d{3} .+`", line) for line in lines), lines
tokens, repacked = (
    load_file(output / f"{budget}/tokens-000002.safetensors") for budget in (1024, 256)
)
for name in ("pair", "branch", "position", "token"):
    assert torch.equal(tokens[name], repacked[name]), name
torch.testing.assert_close(tokens["values"], repacked["values"], rtol=1e-3, atol=1e-4)
count = len(tokens["pair"].unique())
policy, reference = tokens["values"].double()
for branch, side in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
    own = tokens["branch"] == branch
    assert math.isclose(policy[own].sum() / count, last[f"logps/{side}"], rel_tol=1e-6), last
    reward = 0.2 * (policy - reference)[own].sum() / count
    assert math.isclose(reward, last[f"rewards/{side}"], rel_tol=1e-4, abs_tol=1e-6), last
