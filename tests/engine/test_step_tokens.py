"""A step's tokens from one, two and four ranks against transformers, one sequence at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import flat_log_probs, random_pairs
from notus.data.packing import CHOSEN, REJECTED, Rows, pack_division, slots_of
from notus.data.planning import Plan
from notus.engine import distributed
from notus.engine.step_tokens import gather_tokens
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import gather_pairs, token_log_probs
from ranks import call

CPU = torch.device("cpu")
# Row budget and whether the prompt is shared. The step's 7 pairs fill one row or several; with
# four ranks and the small budget, and with one pair left for the last step, ranks are idle.
PACKINGS = {"small": (60, True), "unshared": (60, False), "large": (1000, True)}
STEPS = (0, 1, 2)  # of 7, 7 and 1 pairs


def log_steps(weights: Path, folder: Path) -> int:
    """Each rank's part: the log-probs of every step and packing, and the tokens, gathered."""
    torch.set_num_threads(1)
    ranks = distributed.start("cpu")
    model = MistralForCausalLM(read_shape(weights))
    model.load_state_dict(load_file(weights / "model.safetensors"))
    pairs = random_pairs(15)
    for name, (budget, sharing) in PACKINGS.items():
        plan = Plan(
            slots_of(pairs.lengths, sharing),
            pairs_per_step=7,
            epochs=1,
            max_steps=None,
            seed=0,
            shuffle=True,
            ranks=ranks.count,
            budget=budget,
        )
        for step in STEPS:
            chosen, seen = plan.pairs_of(step), []
            rows = Rows(budget, sharing, CPU)
            for batch in pack_division(plan.division(chosen), pairs, ranks.rank, rows):
                log_probs_S = token_log_probs(model, batch)  # with gradient, as in train.py
                seen.append((batch, torch.vstack((log_probs_S, batch.targets))))
            tokens = gather_tokens(seen, pairs, chosen)._asdict() | {"chosen": torch.tensor(chosen)}
            save_file(tokens, folder / f"{name}-{step}-{ranks.rank}")
    distributed.stop()
    return 0


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_of_a_step_from_all_ranks(ranks, tiny_folder, tmp_path):
    code, told = call(log_steps, tiny_folder, tmp_path, log=tmp_path / "log", ranks=ranks)
    assert code == 0, told
    pairs = random_pairs(15)
    theirs = transformers.MistralForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = flat_log_probs(lambda ids: theirs(ids[None]).logits[0], pairs)
    for name in PACKINGS:
        seen = []
        for step in STEPS:
            of_ranks = [load_file(tmp_path / f"{name}-{step}-{rank}") for rank in range(ranks)]
            tokens, seen = of_ranks[0], [*seen, *of_ranks[0]["chosen"].tolist()]
            for other in of_ranks[1:]:
                assert all(torch.equal(tokens[key], other[key]) for key in tokens)
            by_hand = [
                (pair, branch, position, token)
                for pair in tokens["chosen"].tolist()
                for branch, part in ((CHOSEN, 1), (REJECTED, 2))
                for position, token in enumerate(pairs.tokens[pairs.parts(pair)[part]].tolist())
            ]
            columns = [tokens[key].tolist() for key in ("pair", "branch", "position", "token")]
            assert list(zip(*columns, strict=True)) == by_hand
            log_probs, targets = tokens["values"]
            assert targets.tolist() == columns[3]
            wanted = gather_pairs(expected, pairs, tokens["chosen"].tolist())
            torch.testing.assert_close(log_probs.double(), wanted, rtol=1e-5, atol=1e-5)
        assert sorted(seen) == list(range(15)) and seen != sorted(seen)
    assert np.unique(pairs.lengths[:, 1:]).size > 5  # ragged
