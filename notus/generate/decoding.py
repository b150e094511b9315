"""Token ids of prompts -> token ids of answers, by transformers or by vLLM.

Every prompt has its own random stream, so what is sampled for it depends only on the model, the
prompt and the seed, not on its batch or on where an interrupted run was resumed.
"""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from notus.errors import UserError


class Request(NamedTuple):
    """One prompt's token ids, its temperature (0: greedy decoding) and its random stream.

    draws: a generator on the logits' device, advanced by one draw for every sampled token.
    """

    ids: list[int]
    temperature: float
    draws: torch.Generator


# From a batch of requests to the answers' token ids, without the stop token.
Backend = Callable[[Sequence[Request]], list[list[int]]]


def next_tokens(
    logits_BV: Tensor,
    requests: Sequence[Request],
    live: Sequence[bool],
    top_k: int,
    top_p: float = 1.0,
) -> Tensor:
    """The next token of each sequence: int64 [B].

    logits_BV: float32 on the device of the requests' generators. live: whether each sequence still
    continues; the others draw nothing. top_k: the number of tokens sampled from, 0 for all. top_p:
    of these, the most probable ones whose probabilities add up to at least this share, 1 for all.
    Each row's draw is the one that transformers' `generate` makes for that sequence on its own
    after `torch.manual_seed`.
    """
    tokens_B = logits_BV.argmax(-1)
    rows = [row for row, request in enumerate(requests) if live[row] and request.temperature > 0]
    if not rows:
        return tokens_B
    temperatures = [[requests[row].temperature] for row in rows]
    scaled = logits_BV[rows] / torch.tensor(temperatures, device=logits_BV.device)
    if 0 < top_k < scaled.shape[1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:  # the tail is summed, as in transformers, so that roundings are the same
        ascending, order = scaled.sort(dim=-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[:, -1] = False
        scaled = scaled.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    for row, probabilities in zip(rows, scaled.softmax(-1), strict=True):
        tokens_B[row] = torch.multinomial(probabilities, 1, generator=requests[row].draws)
    return tokens_B


def stop_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and those that the model folder names."""
    stops = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get("eos_token_id")
            stops |= set(found if isinstance(found, list) else [found])
    return sorted(stops - {None})


def until_stop(ids: Sequence[int], stops: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


def transformers_backend(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    device: torch.device,
    dtype: str,
    max_new_tokens: int,
    top_k: int,
    top_p: float = 1.0,
) -> Backend:
    """Answers by transformers' `generate`, one padded batch at a time.

    dtype: "auto" keeps the dtype of the stored weights. The sampling settings of the folder's
    generation_config.json are ignored; its stop tokens count in addition to the tokenizer's.
    """
    logging.disable_progress_bar()  # one bar per rank for a second of loading
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    stops = stop_tokens(folder, tokenizer)
    ends = torch.tensor(stops, device=device)
    pad = tokenizer.eos_token_id  # never attended to
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=pad
    )

    @torch.inference_mode()
    def write(requests: Sequence[Request]) -> list[list[int]]:
        longest = max(len(request.ids) for request in requests)
        ids_BT = torch.full((len(requests), longest), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, request in enumerate(requests):  # padded on the left: all answers start together
            ids_BT[row, longest - len(request.ids) :] = torch.tensor(request.ids)
            mask_BT[row, longest - len(request.ids) :] = 1

        def draw(input_ids: Tensor, scores: Tensor) -> Tensor:
            """Leaves `generate` only the token that each row's own random stream chooses."""
            ended_B = torch.isin(input_ids[:, longest:], ends).any(1)
            tokens_B = next_tokens(scores, requests, (~ended_B).tolist(), top_k, top_p)
            return torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)

        sampled = any(request.temperature > 0 for request in requests)
        try:
            output = model.generate(
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                logits_processor=[draw] if sampled else [],
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"{device}: out of memory with {len(requests)} prompts at a time, the longest of "
                f"{longest} tokens, and {max_new_tokens} new ones; lower --batch-size"
            ) from None
        return [until_stop(row, stops) for row in output[:, longest:].tolist()]

    return write


def import_vllm() -> ModuleType:
    """vLLM, or a UserError that says how to install it."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise UserError(
            f"--backend vllm: {error.name} is not installed; expected vLLM (pip install "
            "'notus[vllm]'), or leave --backend out to use transformers"
        ) from None
    return vllm


def vllm_backend(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    dtype: str,
    max_new_tokens: int,
    top_k: int,
    tensor_parallel: int,
    top_p: float = 1.0,
) -> Backend:
    """Answers by vLLM, which must be installed; every request's seed is its generator's.

    vLLM draws by itself: its samples are repeatable, but differ from `transformers_backend`'s.
    """
    vllm = import_vllm()
    model = vllm.LLM(
        model=str(folder),
        tokenizer=str(folder),
        dtype=dtype,
        seed=0,
        tensor_parallel_size=tensor_parallel,
        generation_config="vllm",  # ignores the sampling settings in the folder's file
    )
    stops = stop_tokens(folder, tokenizer)

    def write(requests: Sequence[Request]) -> list[list[int]]:
        settings = [
            vllm.SamplingParams(
                temperature=request.temperature,
                top_k=top_k or -1,
                top_p=top_p,
                max_tokens=max_new_tokens,
                seed=request.draws.initial_seed(),
                stop_token_ids=stops,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.ids} for request in requests]
        outputs = model.generate(prompts, settings, use_tqdm=False)
        return [until_stop(output.outputs[0].token_ids, stops) for output in outputs]

    return write
