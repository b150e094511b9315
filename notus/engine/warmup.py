"""The first row of a run, which trains nothing."""

import torch

from notus.data.packing import Microbatch, Rows, pack
from notus.data.planning import Division, Plan
from notus.data.token_arrays import TokenizedPairs
from notus.engine.distributed import Ranks, accumulate
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import token_log_probs


def longest_row(plan: Plan, pairs: TokenizedPairs, rows: Rows) -> Microbatch:
    """The longest row of the run, with its pairs; the dry run's memory is of the same length.

    It depends neither on the step that a run resumes from nor on the rank. Takes about a
    millisecond for each step of the plan, unless a row of the full budget is found early.
    """
    longest = Division([], 0)
    for step in range(plan.steps):
        longest = max(longest, plan.division(plan.pairs_of(step)), key=lambda each: each.slots)
        if longest.slots == plan.budget:
            break
    fullest = longest.bins[0][0]
    return pack(pairs, fullest, longest.slots, rows.prefix_sharing).to(rows.device)


def warm_up(
    model: MistralForCausalLM,
    batch: Microbatch,
    ranks: Ranks,
    keep_gathered: bool,
    sum_squares: bool = False,
) -> None:
    """Two microbatches forward and backward, as in a step, whose gradients are dropped.

    Before the first step of a fresh or resumed run. The compiler takes its hints from the first
    row, so that both have the same kernels; the longest row is found not to fit now, and not when
    it comes; and no step is timed that compiles. keep_gathered: see `accumulate`.
    sum_squares: see `token_log_probs`. Leaves the model in evaluation mode. Collective. Raises
    UserError when the memory of the GPU is not enough.
    """
    model.train()
    try:
        for same in accumulate(model, [batch] * 2, 2, keep_gathered):
            (0.0 * token_log_probs(model, same, sum_squares).sum()).backward()
    except torch.OutOfMemoryError as error:
        if not ranks.first:
            raise  # only the first rank's UserError is printed
        raise UserError(
            f"a row of {len(batch.tokens):,} slots does not fit into the memory of the GPU: "
            f"{str(error).splitlines()[0]} Lower data.tokens_per_microbatch, give "
            "parallel.keep_gathered=false or parallel.activation_checkpointing=full, or start on "
            "more GPUs; --dry-run --gpu NAME says what each of them saves"
        ) from error
    model.zero_grad()
    model.eval()
