"""Answers of policy and reference to the same prompts, side by side.

During training the sharded model answers a few prompts itself (`write_samples`); a saved model
answers through transformers (`write_responses`, and the command `python eval.py samples`).
"""

import argparse
import gc
import html
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerFast

from notus.agreement import agree
from notus.config import Config
from notus.data.packing import PADDING, PROMPT, Layout
from notus.data.planning import divide_pairs
from notus.engine import distributed
from notus.engine.distributed import Ranks
from notus.errors import UserError
from notus.evals.answers import (
    BATCH_SIZES,
    add_decoding_options,
    default_name,
    open_answerer,
    respond_all,
    write_whole,
)
from notus.generate.decoding import Request, next_tokens
from notus.generate.prompts import (
    Prompt,
    check_template,
    encode_prompt,
    read_prompt_set,
    read_prompts,
)
from notus.model.attention import build_mask
from notus.model.mistral import MistralForCausalLM
from notus.model.peft import merge
from notus.model.weights import model_folder

PROMPTS_AT_ONCE = 64
SLOTS = 4096  # of one row of prompts and their answers, unless a single one needs more


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
    """The model's response to each prompt, sampled, or greedy at temperature 0; of several turns
    the first. The model may be sharded: nothing is gathered beyond what a forward pass gathers.

    The prompts lie side by side in one row, each followed by room for its answer, and every new
    token of all of them costs one forward pass over that row: there are no cached keys and values.
    So the cost is max_new_tokens forward passes (fewer if all answers end sooner), which for a few
    prompts is that many times the gathering of the weights. Runs uncompiled, so as not to make the
    compiled blocks of training general in the row's length. Collective; the ranks share the
    prompts, and all of them get all responses.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    requests = [
        Request(
            encode_prompt(prompt.prompt, tokenizer, system_prompt),
            temperature,
            torch.Generator(device).manual_seed(seed + number),
        )
        for number, prompt in enumerate(prompts)
    ]
    sizes = np.array([len(request.ids) + max_new_tokens for request in requests], dtype=np.int64)
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
    if dist.is_initialized():
        dist.all_gather_object(parts, written)
    merged = {i: ids for part in parts for i, ids in part.items()}
    return [
        tokenizer.decode(merged[i], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for i in range(len(prompts))
    ]


def _answer_row(
    model: MistralForCausalLM,
    requests: Sequence[Request],
    stop: int,
    max_new_tokens: int,
    slots: int,
    device: torch.device,
) -> list[list[int]]:
    """The tokens that follow each request's, up to `stop`; all ranks take equally many steps."""
    tokens_T = torch.zeros(slots, dtype=torch.int64)
    document_T = torch.full((slots,), PADDING, dtype=torch.int32)
    position_T = torch.zeros(slots, dtype=torch.int32)
    last_S = torch.zeros(len(requests), dtype=torch.int64)
    cursor = 0
    for number, request in enumerate(requests):
        length, end = len(request.ids), cursor + len(request.ids) + max_new_tokens
        tokens_T[cursor : cursor + length] = torch.tensor(request.ids)
        document_T[cursor:end] = number
        position_T[cursor:end] = torch.arange(end - cursor)
        last_S[number] = cursor + length - 1
        cursor = end
    tokens_T, document_T, position_T, last_S = (
        tensor.to(device) for tensor in (tokens_T, document_T, position_T, last_S)
    )
    # What lies in the room for answers is later than all that is there, so nothing sees it.
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
        if not _anywhere(any(live), device):
            break
    return answers


def _anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; collective."""
    if not dist.is_initialized():
        return flag
    found: Tensor = torch.tensor(float(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def record_samples(
    folder: Path,
    board: SummaryWriter,
    step: int,
    prompts: Sequence[Prompt],
    reference: Sequence[str],
    policy: Sequence[str],
) -> None:
    """Show responses after `step` steps in `folder`/samples.md and in TensorBoard's text tab.

    What the file holds of this step and later ones, from before the run was resumed, is replaced.
    Only one rank may call it.
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
    """Each prompt over a table of the responses to it: a column per model, a row per turn.

    columns: from a model's name to its responses to each prompt, one for each turn. What the texts
    hold of Markdown or HTML is shown as it was written, line by line.
    """
    sections = []
    for number, prompt in enumerate(prompts):
        section = [f"**{number + 1}.** {_cell(prompt.text)}", ""]
        if prompt.answer is not None:
            section += [f"The right answer: {_cell(prompt.answer)}", ""]
        section += [f"| {' | '.join(map(_cell, columns))} |", "|---" * len(columns) + "|"]
        for turn in range(1 + len(prompt.follow_ups)):
            told = [responses[number][turn] for responses in columns.values()]
            if turn:
                asked = f"*{_cell(prompt.follow_ups[turn - 1])}*"
                section.append(f"| {asked} |" + " |" * (len(columns) - 1))
            section.append(f"| {' | '.join(map(_cell, told))} |")
        sections.append("\n".join(section) + "\n")
    return "\n".join(sections)


def _cell(text: str) -> str:
    """Text that a Markdown table shows as it is, on one line of the source."""
    shown = re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(text.strip(), quote=False))
    for sign in "$~":  # some readers take them for markup, some cannot escape them
        shown = shown.replace(sign, f"&#{ord(sign)};")
    return "<br>".join(shown.splitlines())


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
    """The response of the saved model in `folder` to each prompt, of several turns the first.

    Sampled from all tokens, or greedy at temperature 0. Collective if there is a process group: the
    ranks share the prompts.
    """
    responses = respond_all(
        folder,
        [prompt._replace(follow_ups=()) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=0,
        seed=seed,
        system_prompt=system_prompt,
        batch_size=PROMPTS_AT_ONCE,
        dtype="auto",
        strip=False,
        device=device,
    )
    return [first for first, *_ in responses]


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
            gc.collect()  # cycles still hold the model before, whose memory this one needs
            return write_responses(
                folder,
                prompts,
                max_new_tokens=samples.max_new_tokens,
                temperature=samples.temperature,
                seed=config.train.seed,
                system_prompt=config.data.system_prompt,
                device=ranks.device,
            )

        before, final = answers(reference), output / "final"
        if config.model.lora is None or config.model.lora.merge:
            after = answers(final)
        else:  # transformers answers for whole models; this one is needed for a moment
            whole = output / ".merged"
            agree(lambda: merge(source, final / "adapter", whole) if ranks.first else None)
            after = answers(whole)
            agree(lambda: shutil.rmtree(whole) if ranks.first else None)
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
    names = (
        "eval_loss",
        "eval_perplexity",
        "eval_rewards/accuracies",
        "eval_rewards/margins",
        "eval_logps/chosen",
        "eval_logps/rejected",
    )
    return [
        (name, evaluated[0][name], evaluated[-1][name])
        for name in names
        if evaluated and name in evaluated[0]
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


# --------------------------------------------------------------------------------- command line


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `samples` to the command line."""
    parser = commands.add_parser(
        "samples",
        help="answers of a model and its reference to the same prompts, side by side",
        description="Let a model and its reference answer the same prompts and show both, as "
        "Markdown. Under torchrun the GPUs share the prompts.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or hub id")
    parser.add_argument("--reference", required=True, metavar="REF", help="another of the same")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help='JSON lines {"prompt": text or messages}, or questions of AlpacaEval or MT-Bench',
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: standard output)")
    parser.add_argument("--system-prompt", help="begin conversations with it, as in training")
    add_decoding_options(parser, max_new_tokens=256, temperature=0.0)
    parser.set_defaults(run=run_samples)


def run_samples(options: argparse.Namespace) -> int:
    """Carry out `samples`."""
    try:
        show_samples(options, distributed.start())
    finally:
        distributed.stop()
    return 0


def show_samples(options: argparse.Namespace, ranks: Ranks) -> None:
    """Answer all prompts with both models and write the answers. Collective."""
    folders, prompts = agree(lambda: _open(options))
    columns = {}
    for name, folder in folders.items():
        columns[name] = respond_all(
            folder,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
            system_prompt=options.system_prompt,
            batch_size=options.batch_size or BATCH_SIZES["transformers"],
            dtype=options.dtype,
            strip=True,
            device=ranks.device,
        )
        gc.collect()  # the next model needs the memory
    text = samples_markdown(prompts, columns)
    if options.out is None:
        ranks.say(text)
    elif ranks.first:
        write_whole(options.out, text)
        print(f"wrote {len(prompts)} prompts with both answers to {options.out}")


def _open(options: argparse.Namespace) -> tuple[dict[str, Path], list[Prompt]]:
    """Both models' folders by the names of their columns, and the prompts, all checked."""
    if options.out is not None and options.out.exists():
        raise UserError(f"--out {options.out}: the file exists; remove it or give another name")
    if options.out is not None and not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {options.out.parent}")
    prompts = read_prompt_set(options.prompts).prompts
    folders, sizes = {}, {}
    for role, model in (("reference", options.reference), ("policy", options.model)):
        folder, tokenizer, shape = open_answerer(model)
        check_template(prompts, options.prompts, folder, tokenizer)
        folders[f"{role}: {default_name(model)}"] = folder
        sizes[role] = shape.vocab_size
    if sizes["policy"] != sizes["reference"]:
        raise UserError(
            f"--reference: {options.reference} has a vocabulary of {sizes['reference']} tokens, "
            f"{options.model} one of {sizes['policy']}; expected the same"
        )
    return folders, prompts
