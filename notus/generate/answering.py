"""Conversations -> responses of a saved model, turn by turn, on one rank or on all."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from notus.data.formats import Message
from notus.data.tokenizer import load_tokenizer
from notus.engine.distributed import map_over_ranks
from notus.generate.decoding import Backend, Request, transformers_backend
from notus.generate.prompts import Prompt, encode_prompt
from notus.model.weights import open_model

Encode = Callable[[str | list[Message]], list[int]]
Decode = Callable[[list[int]], str]


def open_answerer(model: str) -> tuple[Path, PreTrainedTokenizerFast]:
    """The folder and tokenizer of a complete model, a folder or a hub id. Raises UserError."""
    folder, shape = open_model(model)
    return folder, load_tokenizer(folder, shape.vocab_size)


def answer(
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    write: Backend,
    encode: Encode,
    decode: Decode,
    device: torch.device,
) -> list[list[str]]:
    """The responses to each prompt of a batch: to the prompt, then to each of its follow-ups.

    device: where `write` draws. A prompt's turns share one random stream, which starts at its seed.
    """
    conversations = [prompt.prompt for prompt in prompts]
    streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    responses: list[list[str]] = [[] for _ in prompts]
    for turn in range(1 + max(len(prompt.follow_ups) for prompt in prompts)):
        going = [i for i, prompt in enumerate(prompts) if turn <= len(prompt.follow_ups)]
        written = write(
            [Request(encode(conversations[i]), temperatures[i], streams[i]) for i in going]
        )
        for i, ids in zip(going, written, strict=True):
            responses[i].append(decode(ids))
            for follow_up in prompts[i].follow_ups[turn : turn + 1]:
                conversations[i] = [
                    *conversations[i],
                    {"role": "assistant", "content": responses[i][-1]},
                    {"role": "user", "content": follow_up},
                ]
    return responses


def decoder(tokenizer: PreTrainedTokenizerFast, strip: bool) -> Decode:
    """From token ids to text without special tokens, and without surrounding space if `strip`."""

    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return (lambda ids: decode(ids).strip()) if strip else decode


def respond_all(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    seed: int,
    system_prompt: str | None,
    batch_size: int,
    device: torch.device,
    **decoding: Any,
) -> list[list[str]]:
    """The stripped responses of the model in `folder` to each prompt, one for each turn.

    decoding: the other arguments of `transformers_backend`. The ranks share the prompts, and every
    rank gets all responses. Collective.
    """

    def respond(share: Sequence[tuple[int, Prompt]]) -> list[list[str]]:
        if not share:
            return []
        tokenizer = load_tokenizer(folder)
        encode = partial(encode_prompt, tokenizer=tokenizer, system_prompt=system_prompt)
        decode = decoder(tokenizer, strip=True)
        write = transformers_backend(folder, tokenizer, device=device, **decoding)
        responses: list[list[str]] = []
        for start in range(0, len(share), batch_size):
            numbers, batch = zip(*share[start : start + batch_size], strict=True)
            seeds = [seed + number for number in numbers]
            temperatures = [temperature] * len(batch)
            responses += answer(batch, temperatures, seeds, write, encode, decode, device)
        return responses

    parts = map_over_ranks(list(enumerate(prompts)), respond)
    return [responses for part in parts for responses in part]
