"""Answers of policy and reference to the same prompts, side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from notus.data.preferences import Message, read_rows
from notus.data.tokenization import load_tokenizer
from notus.errors import UserError

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
        if not isinstance(prompt, str | list) or not prompt:
            raise UserError(f"{where}: prompt is {json.dumps(prompt)}, expected text or messages")
        if answer is not None and not isinstance(answer, str):
            raise UserError(f"{where}: answer is {json.dumps(answer)}, expected text")
        prompts.append(Prompt(prompt, answer))
    return prompts


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
    device: torch.device,
) -> list[str]:
    """The response of the model in `folder` to each prompt, sampled, or greedy at temperature 0."""
    if not prompts:
        return []
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    # Sampling is governed by the arguments alone, not by what the folder's own defaults may say.
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    responses = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        texts, special = [], False
        for prompt in prompts[start : start + PROMPTS_AT_ONCE]:
            if isinstance(prompt.prompt, str):
                texts.append(prompt.prompt)
                special = True
            else:
                texts.append(
                    tokenizer.apply_chat_template(
                        prompt.prompt, tokenize=False, add_generation_prompt=True
                    )
                )
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special).to(
            device
        )
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


def side_by_side(
    prompts: Sequence[Prompt], policy: Sequence[str], reference: Sequence[str], count: int
) -> str:
    """The first `count` prompts with both responses, as text for the terminal."""
    lines = []
    for prompt, ours, theirs in list(zip(prompts, policy, reference, strict=True))[:count]:
        lines += [
            f"prompt     {_one_line(prompt.text)}",
            f"reference  {_one_line(theirs)}",
            f"policy     {_one_line(ours)}",
            "",
        ]
    return "\n".join(lines)


def before_and_after(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """A table of (name, before, after) as text; rows without both values are left out."""
    known = [row for row in rows if None not in row]
    width = max((len(name) for name, *_ in known), default=0)
    lines = [f"{'':{width}}  {'before':>10}  {'after':>10}"]
    lines += [f"{name:{width}}  {before:10.4f}  {after:10.4f}" for name, before, after in known]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " / ".join(text.strip().splitlines())[:300]
