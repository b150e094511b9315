"""The end of a run, printed: held-out metrics and answers before and after training."""

import gc
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from notus.config import Config
from notus.engine.best import best_step
from notus.engine.distributed import Ranks
from notus.errors import agreed
from notus.generate.answering import respond_all
from notus.generate.prompts import Prompt, read_prompt_set
from notus.generate.samples import share_right
from notus.model.hub import model_folder
from notus.model.peft import merge
from notus.tables import text_table

PROMPTS_AT_ONCE = 64
HELD_OUT = (
    "loss",
    "perplexity",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def show_result(config: Config, ranks: Ranks, source: Path, output: Path) -> None:
    """Print held-out metrics before and after training, and answers of reference and policy.

    source: the folder of the initial policy; output: the finished run's. Collective.
    """
    exported = best_step(output / "checkpoints") if config.evaluation.export_best else None
    rows = held_out_rows(output / "metrics.jsonl", exported)
    shown = ""
    if (samples := config.evaluation.samples) is not None:
        prompts = [
            prompt._replace(follow_ups=()) for prompt in read_prompt_set(samples.prompts).prompts
        ]
        reference = model_folder(config.model.reference) if config.model.reference else source
        policy = output / "final"
        unmerged = config.model.lora is not None and not config.model.lora.merge
        if unmerged:  # transformers answers only for a full model; this one is needed for a moment
            adapter, policy = policy / "adapter", output / ".merged"
            with agreed():
                if ranks.first:
                    merge(source, adapter, policy)
        answers = []
        for folder in (reference, policy):
            gc.collect()  # cycles still hold an earlier model, whose memory this one needs
            responses = respond_all(
                folder,
                prompts,
                max_new_tokens=samples.max_new_tokens,
                temperature=samples.temperature,
                top_k=0,
                seed=config.train.seed,
                system_prompt=config.data.system_prompt,
                batch_size=PROMPTS_AT_ONCE,
                dtype="auto",
                device=ranks.device,
            )
            answers.append([response for (response,) in responses])
        before, after = answers
        if unmerged and ranks.first:
            shutil.rmtree(policy)
        marks = [share_right(prompts, responses) for responses in (before, after)]
        if None not in marks:
            rows.append((f"right answers of {len(prompts)}", *marks))
        shown = side_by_side(prompts, after, before, samples.count)
    if rows:
        ranks.say("\n" + text_table(("", "before", "after"), rows, digits=4))
    if shown:
        ranks.say("\n" + shown)


def held_out_rows(metrics: Path, step: int | None = None) -> list[tuple[str, float, float]]:
    """(name, first value, last value) of the held-out metrics in a metrics.jsonl that has any.

    All pairs together come first, then the named sets. step: of the last value, if it is not that
    of the last evaluation.
    """
    if not metrics.is_file():  # a run resumed elsewhere after its last step logs nothing
        return []
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    if not evaluated:
        return []
    first, last = evaluated[0], evaluated[-1]
    last = next((line for line in evaluated if line["step"] == step), last)
    sets = [name.removesuffix("loss") for name in first if name.endswith("/loss")]
    names = [part + name for part in ("eval_", *sets) for name in HELD_OUT]
    return [(name, first[name], last[name]) for name in names if name in first and name in last]


def side_by_side(
    prompts: Sequence[Prompt], policy: Sequence[str], reference: Sequence[str], count: int
) -> str:
    """The first `count` prompts that the two answered differently, with both responses, as text."""
    answered = zip(prompts, policy, reference, strict=True)
    different = [(prompt, ours, theirs) for prompt, ours, theirs in answered if ours != theirs]
    lines = [f"{len(different)} of {len(prompts)} prompts are answered differently", ""]
    for prompt, ours, theirs in different[:count]:
        lines.append(f"prompt     {_one_line(prompt.text)}")
        if prompt.answer is not None:
            lines.append(f"answer     {_one_line(prompt.answer)}")
        lines += [f"reference  {_one_line(theirs)}", f"policy     {_one_line(ours)}", ""]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " / ".join(text.strip().splitlines())[:300]
