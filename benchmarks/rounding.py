"""How much honest computations of the same log-probs differ; notus/objective/rounding.py allows it.

    python -m benchmarks.rounding           # one CUDA GPU: 8 layers of Mistral-7B's width, bfloat16
    python -m benchmarks.rounding --toy     # 2 small layers on the CPU, float32

A random Mistral scores the same pairs packed in rows of 8,192 slots, packed in shorter rows in the
reverse order, and one sequence at a time by transformers' model with float32 logits. Printed are
the largest |difference of a response's sum| / sqrt(its tokens), the mean per token, and whether
both are within the bounds of a run's start. Exit code 1: they are not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.memory import pretended_ranks
from benchmarks.roofline import MODELS
from benchmarks.train_speed import TINY, hf_config, random_pairs
from notus.data.packing import Rows
from notus.data.token_arrays import TokenizedPairs
from notus.files import write_json
from notus.model.hf_config import ModelShape
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import response_sums, score
from notus.objective.rounding import compare

LOGITS_DEVIATION = 2.4


def random_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> MistralForCausalLM:
    """Products keep the scale of what they multiply; logits deviate by LOGITS_DEVIATION."""
    with torch.device("meta"):
        model = MistralForCausalLM(shape).to(dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for weight in model.state_dict().values():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, weight.shape[1] ** -0.5)
    model.state_dict()["lm_head.weight"].mul_(LOGITS_DEVIATION)
    return model


@torch.no_grad()
def one_by_one(model: MistralForCausalLM, pairs: TokenizedPairs, device: torch.device) -> Tensor:
    """The sums of transformers' model, one sequence at a time: float64 [pairs, 2]."""
    with torch.device(device):
        theirs = transformers.MistralForCausalLM(hf_config(model.shape)).to(model.lm_head.weight)
    theirs.load_state_dict(model.state_dict())
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for index in range(len(pairs)):
        prompt, *responses = (pairs.tokens[part] for part in pairs.parts(index))
        for side, response in enumerate(responses):
            tokens = torch.from_numpy(np.concatenate((prompt, response))).long().to(device)
            logits = theirs(tokens[None]).logits[0, len(prompt) - 1 : -1].float()
            targets = tokens[len(prompt) :, None]
            sums[index, side] = logits.log_softmax(-1).gather(1, targets).double().sum()
    return sums


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a small model on the CPU")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write every difference here")
    options = parser.parse_args(arguments)
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA GPU was found; --toy compares a small model on the CPU")
    device = torch.device("cpu" if options.toy else "cuda")
    dtype = torch.float32 if options.toy else torch.bfloat16
    shape = TINY if options.toy else MODELS["A"]
    pairs = random_pairs("uf", options.pairs, shape.vocab_size)
    lengths = torch.from_numpy(pairs.lengths[:, 1:])
    model = random_model(shape, device, dtype)

    def packed(order: np.ndarray, budget: int) -> Tensor:
        flat = score(model, pairs, order, Rows(budget, True, device)).cpu()
        return response_sums(flat, lengths[order])[np.argsort(order)]

    with pretended_ranks(1):
        order = np.arange(len(pairs))
        first, second = packed(order, 8192), packed(order[::-1].copy(), 3072)
    others = {"other packing": second, "one by one": one_by_one(model, pairs, device)}
    within, report, words = True, {"lengths": lengths.tolist()}, []
    for name, sums in others.items():
        difference = first - sums
        found = compare(difference.flatten(), lengths.flatten(), dtype)
        within &= found.within
        print(f"{name}: {found.words}")
        by_root = (difference / lengths.double().sqrt()).abs()
        report[name] = {"differences": difference.tolist(), "within": found.within}
        mean = float(difference.sum() / lengths.sum())
        words.append(f"{name} {float(by_root.max()):.2g} and {mean:.1e}")
    if options.json is not None:
        write_json(options.json, report)
    print(f"largest / sqrt(n) and mean in nats: {', '.join(words)}")
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
