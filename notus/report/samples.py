"""Answers of policy and reference to the same prompts, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from notus.config import Config
from notus.data.preferences import Message, read_messages, read_rows
from notus.data.tokenization import load_tokenizer, with_system_prompt
from notus.engine.distributed import Ranks, divide
from notus.errors import UserError
from notus.model.weights import model_folder

PROMPTS_AT_ONCE = 64


class Prompt(NamedTuple):
    """Something to answer, and the one right answer where there is one."""

    prompt: str | list[Message]
    answer: str | None

    @property
    def text(self) -> str:
        """What the user asked, for display."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a JSON or JSONL file with rows {"prompt": text or messages, "answer"?: text}.

    Raises UserError that names the row when one is not of that form.
    """
    prompts = []
    for where, row in read_rows(path):
        prompt, answer = row.get("prompt"), row.get("answer")
        if isinstance(prompt, list):
            prompt = read_messages(row, "prompt", where)
        if not isinstance(prompt, str | list) or not prompt:
            raise UserError(f"{where}: prompt is {json.dumps(prompt)}, expected text or messages")
        if answer is not None and not isinstance(answer, str):
            raise UserError(f"{where}: answer is {json.dumps(answer)}, expected text")
        prompts.append(Prompt(prompt, answer))
    return prompts


def check_prompts(path: str, folder: Path) -> None:
    """Raise UserError unless the prompts at `path` can be put to the model in `folder`."""
    conversational = any(not isinstance(prompt.prompt, str) for prompt in read_prompts(path))
    if conversational and not load_tokenizer(folder).chat_template:
        raise UserError(
            f"{path}: found conversations, but the tokenizer has no chat template; expected "
            f"chat_template in {folder}/tokenizer_config.json, or prompts of plain text"
        )


def is_right(generated: str, answer: str) -> bool:
    """Whether a response is the answer and nothing else."""
    return generated.strip() == answer.strip()


def share_right(prompts: Sequence[Prompt], responses: Sequence[str]) -> float | None:
    """The share of right responses among the prompts that have an answer; None without any."""
    marks = [
        is_right(response, prompt.answer)
        for prompt, response in zip(prompts, responses, strict=True)
        if prompt.answer is not None
    ]
    return sum(marks) / len(marks) if marks else None


@torch.inference_mode()
def write_responses(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    system_prompt: str | None,
    device: torch.device,
) -> list[str]:
    """The response of the model in `folder` to each prompt, sampled, or greedy at temperature 0.

    Prompts are encoded as in training ("clean"): a conversation has the special tokens that its
    template writes, plain text those of the tokenizer.
    """
    if not prompts:
        return []
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    logging.disable_progress_bar()  # one bar a rank for a second's loading
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    # Sampling is governed by the arguments alone, not by what the folder's own defaults may say.
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    responses = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = [prompt.prompt for prompt in prompts[start : start + PROMPTS_AT_ONCE]]
        ids = [_encode(prompt, tokenizer, system_prompt) for prompt in batch]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        responses += tokenizer.batch_decode(new, skip_special_tokens=True)
    return responses


def _encode(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    messages = with_system_prompt(prompt, system_prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def show_result(config: Config, ranks: Ranks, source: Path, output: Path) -> None:
    """Print held-out metrics before and after training, and answers of reference and policy.

    source: the folder of the initial policy; output: the finished run's. The ranks share the
    writing. Collective.
    """
    rows = held_out_rows(output / "metrics.jsonl")
    shown = ""
    if (samples := config.evaluation.samples) is not None:
        prompts = read_prompts(samples.prompts)
        reference = model_folder(config.model.reference) if config.model.reference else source

        def answers(folder: Path) -> list[str]:
            parts = divide(
                prompts,
                lambda share: write_responses(
                    folder,
                    share,
                    max_new_tokens=samples.max_new_tokens,
                    temperature=samples.temperature,
                    seed=config.train.seed,
                    system_prompt=config.data.system_prompt,
                    device=ranks.device,
                ),
            )
            return [answer for part in parts for answer in part]

        before, after = answers(reference), answers(output / "final")
        marks = [share_right(prompts, answered) for answered in (before, after)]
        if None not in marks:
            rows.append((f"right answers of {len(prompts)}", *marks))
        shown = side_by_side(prompts, after, before, samples.count)
    if rows:
        ranks.say("\n" + before_and_after(rows))
    ranks.say("\n" + shown)


def held_out_rows(metrics: Path) -> list[tuple[str, float, float]]:
    """(name, first, last) of the main held-out metrics in a metrics.jsonl that has any."""
    if not metrics.is_file():  # a run resumed elsewhere after its last step logs nothing
        return []
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    return [
        (f"eval_{name}", evaluated[0][f"eval_{name}"], evaluated[-1][f"eval_{name}"])
        for name in (names if evaluated else ())
    ]


def side_by_side(
    prompts: Sequence[Prompt], policy: Sequence[str], reference: Sequence[str], count: int
) -> str:
    """The first `count` prompts that the two answered differently, with both responses, as text."""
    answered = zip(prompts, policy, reference, strict=True)
    different = [(prompt, ours, theirs) for prompt, ours, theirs in answered if ours != theirs]
    lines = [f"{len(different)} of {len(prompts)} prompts are answered differently; the first:", ""]
    for prompt, ours, theirs in different[:count]:
        lines.append(f"prompt     {_one_line(prompt.text)}")
        if prompt.answer is not None:
            lines.append(f"answer     {_one_line(prompt.answer)}")
        lines += [f"reference  {_one_line(theirs)}", f"policy     {_one_line(ours)}", ""]
    return "\n".join(lines)


def before_and_after(rows: Sequence[tuple[str, float, float]]) -> str:
    """A table of (name, before, after) as text."""
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}}  {'before':>10}  {'after':>10}"]
    lines += [f"{name:{width}}  {before:10.4f}  {after:10.4f}" for name, before, after in rows]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " / ".join(text.strip().splitlines())[:300]
