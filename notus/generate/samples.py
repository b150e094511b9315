"""A few answers of the policy during training, and the page that shows them."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerFast

from notus.data.packing import PADDING, PROMPT, Layout
from notus.data.planning import divide_pairs
from notus.files import write_whole
from notus.generate.answering import decoder
from notus.generate.decoding import Request, next_tokens
from notus.generate.prompts import Prompt, encode_prompt
from notus.model.attention import build_mask
from notus.model.mistral import MistralForCausalLM

SLOTS = 4096  # of one row of prompts and their answers, unless a single one needs more


def is_right(generated: str, answer: str) -> bool:
    """Whether a response is exactly the answer, apart from surrounding white space."""
    return generated.strip() == answer.strip()


def share_right(prompts: Sequence[Prompt], responses: Sequence[str]) -> float | None:
    """The share of right responses among the prompts that have an answer; None without any."""
    marks = [
        is_right(response, prompt.answer)
        for prompt, response in zip(prompts, responses, strict=True)
        if prompt.answer is not None
    ]
    return sum(marks) / len(marks) if marks else None


@torch.no_grad()
def write_samples(
    model: MistralForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    system_prompt: str | None,
    device: torch.device,
) -> list[str]:
    """The model's response to each prompt (to the first turn), sampled, or greedy at temperature 0.

    The model may be sharded: nothing is gathered beyond what a forward pass gathers. The prompts
    are side by side in one row, each followed by room for its answer, and one forward pass over
    that row gives one new token of every answer, without cached keys and values. So the cost is
    max_new_tokens forward passes (fewer if all answers end sooner); for a few prompts, that is
    mostly gathering the weights as many times. Runs uncompiled, because another row length would
    make the compiled blocks of training dynamic in it. The ranks share the prompts, and every rank
    gets all responses. Collective.
    """
    requests = [
        Request(
            encode_prompt(prompt.prompt, tokenizer, system_prompt),
            temperature,
            torch.Generator(device).manual_seed(seed + number),
        )
        for number, prompt in enumerate(prompts)
    ]
    sizes = np.array([len(request.ids) + max_new_tokens for request in requests], dtype=np.int64)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    division = divide_pairs(range(len(sizes)), sizes, ranks=ranks, budget=max(SLOTS, *sizes, 0))
    written: dict[int, list[int]] = {}
    with torch.compiler.set_stance("force_eager"):
        for bins in division.bins:
            own = [requests[i] for i in bins[rank]]
            answers = _answer_row(
                model, own, tokenizer.eos_token_id, max_new_tokens, division.slots, device
            )
            written |= dict(zip(bins[rank], answers, strict=True))
    parts = [written] * ranks
    dist.all_gather_object(parts, written)
    merged = {i: ids for part in parts for i, ids in part.items()}
    decode = decoder(tokenizer, strip=False)
    return [decode(merged[i]) for i in range(len(prompts))]


def _answer_row(
    model: MistralForCausalLM,
    requests: Sequence[Request],
    stop: int,
    max_new_tokens: int,
    slots: int,
    device: torch.device,
) -> list[list[int]]:
    """The answer's tokens for each request, up to `stop`. Every rank takes equally many steps."""
    tokens_T = torch.zeros(slots, dtype=torch.int64, device=device)
    document_T = torch.full((slots,), PADDING, dtype=torch.int32, device=device)
    position_T = torch.zeros(slots, dtype=torch.int32, device=device)
    last_S = torch.zeros(len(requests), dtype=torch.int64, device=device)
    cursor = 0
    for number, request in enumerate(requests):
        length, end = len(request.ids), cursor + len(request.ids) + max_new_tokens
        tokens_T[cursor : cursor + length] = torch.tensor(request.ids)
        document_T[cursor:end] = number
        position_T[cursor:end] = torch.arange(end - cursor)
        last_S[number] = cursor + length - 1
        cursor = end
    # The room for an answer comes after its prompt, so causal attention never sees it empty.
    layout = Layout(
        document=document_T,
        branch=torch.full_like(document_T, PROMPT),
        position=position_T,
        hidden=torch.zeros_like(document_T, dtype=torch.bool),
    )
    mask = build_mask(layout, model.shape.sliding_window, "dense")
    answers: list[list[int]] = [[] for _ in requests]
    live = [True] * len(requests)
    for step in range(max_new_tokens):
        logits_SV, _ = model(tokens_T, position_T, mask, last_S + step, None)
        next_S = next_tokens(logits_SV, requests, live, top_k=0)
        tokens_T[last_S + step + 1] = next_S
        for i, token in enumerate(next_S.tolist()):
            live[i] &= token != stop
            if live[i]:
                answers[i].append(token)
        going = torch.tensor(any(live), dtype=torch.float32, device=device)
        dist.all_reduce(going, dist.ReduceOp.MAX)
        if not going:  # on any rank
            break
    return answers


def record_samples(
    folder: Path,
    board: SummaryWriter,
    step: int,
    prompts: Sequence[Prompt],
    reference: Sequence[str],
    policy: Sequence[str],
) -> None:
    """Show the responses after `step` steps in `folder`/samples.md and in TensorBoard's text tab.

    Sections of this step and later ones, written before the run was resumed, are replaced. Only one
    rank may call it.
    """
    columns = {"reference": [[text] for text in reference], "policy": [[text] for text in policy]}
    text = samples_markdown(prompts, columns)
    path = folder / "samples.md"
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    for heading in re.finditer(r"^## After (\d+) steps$", earlier, re.MULTILINE):
        if int(heading[1]) >= step:
            earlier = earlier[: heading.start()]
            break
    earlier = earlier.rstrip() + "\n\n" if earlier else ""
    write_whole(path, f"{earlier}## After {step} steps\n\n{text}")
    board.add_text("samples", text, step)


def samples_markdown(prompts: Sequence[Prompt], columns: dict[str, Sequence[Sequence[str]]]) -> str:
    """Markdown: each prompt above a table of its responses, one column per model, one row per turn.

    columns: from a model's name to its responses to each prompt, one for each turn. Markdown and
    HTML in the texts are escaped; line breaks are kept.
    """
    sections = []
    for number, prompt in enumerate(prompts):
        section = [f"**{number + 1}.** {_cell(prompt.text)}", ""]
        if prompt.answer is not None:
            section += [f"The right answer: {_cell(prompt.answer)}", ""]
        section += [f"| {' | '.join(map(_cell, columns))} |", "|---" * len(columns) + "|"]
        for turn in range(1 + len(prompt.follow_ups)):
            answers = [responses[number][turn] for responses in columns.values()]
            if turn:
                asked = f"*{_cell(prompt.follow_ups[turn - 1])}*"
                section.append(f"| {asked} |" + " |" * (len(columns) - 1))
            section.append(f"| {' | '.join(map(_cell, answers))} |")
        sections.append("\n".join(section) + "\n")
    return "\n".join(sections)


def _cell(text: str) -> str:
    """Text escaped so that a Markdown table shows it unchanged, on one line of the source."""
    shown = re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(text.strip(), quote=False))
    for sign in "$~":  # markup for some renderers, and some of those know no escape
        shown = shown.replace(sign, f"&#{ord(sign)};")
    return "<br>".join(shown.splitlines())
