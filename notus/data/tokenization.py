"""Pairs of text or conversations -> token ids, split exactly where the response begins.

"clean" renders each branch (the prompt with one response) as one text, encodes it once, and finds
the boundary by character offsets, so the tokens are those that the model meets when it answers.
"trl-0.7.4" is what Zephyr and Notus were trained with: prompt and responses are encoded separately
(a response then begins with the tokenizer's dummy prefix), every end-of-sequence token inside them
is hidden from attention, and one more is appended.

Added tokens that a message spells out are read as text under "clean": only the template makes
turns, so a conversation's ids hold exactly the added tokens that the template wrote, or the pair is
dropped. They stay special in plain text, which brings its own, and under "trl-0.7.4". Either way
such pairs are counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from os.path import commonprefix
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerFast

from notus.data.formats import PARTS, Pair
from notus.data.special_tokens import guard_of, spells_added, without_ends
from notus.data.template import check_written, render, with_system_prompt
from notus.data.token_arrays import Tokenized, TokenizedPairs
from notus.errors import UserError

PAIRS_AT_ONCE = 256  # handed to the tokenizer's own threads in one call

AS_TEXT = "with special-token text in content, read as text"
AS_SPECIAL = "with special-token text in content, read as special tokens"
FORGES = "dropped: text in content that the tokenizer can only read as special tokens"


# A pair's token ids by part (a missing rejected response is empty), and what else is counted of it.
_Encoded = tuple[list[list[int]], str | None]


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerFast,
    *,
    style: str,
    truncation: str,
    max_length: int,
    max_prompt_length: int,
    system_prompt: str | None,
) -> Tokenized:
    """Render, encode and truncate `pairs`; style is "clean" or "trl-0.7.4".

    A pair without a rejected response has none in the result. Raises a UserError that names the
    pair when its prompt is not a prefix of both branches, in text or in tokens, and when a
    conversation meets a tokenizer without a chat template.
    """
    encode, rule = (_clean, truncation) if style == "clean" else (_trl_0_7_4, "trl-0.7.4")
    tokens: list[int] = []
    lengths: list[tuple[int, int, int]] = []
    whole_lengths: list[tuple[int, int, int]] = []
    kept: list[int] = []
    counts: Counter[str] = Counter()
    examples: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] += 1
        examples.setdefault(name, index)

    for index, (parts, remark) in enumerate(encode(pairs, tokenizer, system_prompt)):
        if remark:
            count(remark)
        if remark == FORGES:
            continue
        full = tuple(map(len, parts))
        if full[0] == 0:
            count("dropped: empty prompt")
            continue
        cut = truncate(*full, max_length=max_length, max_prompt_length=max_prompt_length, rule=rule)
        if cut is None:
            count("dropped: longer than max_length")
            continue
        prompt, chosen, rejected = parts[0], parts[1][: cut[1]], parts[2][: cut[2]]
        if style == "clean" and chosen == rejected:
            count("dropped: identical responses after truncation")
            continue
        for name, before, after in zip(PARTS, full, cut, strict=True):
            if after < before:
                count(f"cut: {name}")
        if cut[0] < full[0]:  # the prompt keeps its end, and under "clean" its BOS
            first = int(style == "clean" and prompt[0] == tokenizer.bos_token_id)
            prompt = prompt[:first] + prompt[full[0] - cut[0] + first :]
        tokens += prompt + chosen + rejected
        lengths.append(cut)
        whole_lengths.append(full)
        kept.append(index)

    flat = np.array(tokens, dtype=np.int32)
    found = TokenizedPairs(flat, np.zeros(len(flat), bool), _by_part(lengths))
    if style == "trl-0.7.4":  # hides every EOS but the one that was appended to each response
        found.hidden[:] = flat == tokenizer.eos_token_id
        is_whole = (found.lengths == _by_part(whole_lengths)) & (found.lengths > 0)
        last = found.starts + found.lengths - 1
        found.hidden[last[:, 1:][is_whole[:, 1:]]] = False
    indices = np.array(kept, dtype=np.int64)
    lengths_before = _by_part(whole_lengths)
    return Tokenized(found, indices, len(pairs), lengths_before, dict(counts), examples)


def _by_part(lengths: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(lengths, dtype=np.int64).reshape(-1, 3)


def truncate(
    prompt: int, chosen: int, rejected: int, *, max_length: int, max_prompt_length: int, rule: str
) -> tuple[int, int, int] | None:
    """Tokens kept of each part (the prompt's last, a response's first), or None to drop the pair.

    "pair": if the prompt and the longer response exceed max_length, the prompt keeps at most
    max_prompt_length and both responses are cut to what is left. "sequence": each sequence keeps
    its first max_length tokens. "drop": nothing is ever cut. "trl-0.7.4": as "pair", but responses
    are cut to max_length - max_prompt_length however short the prompt is.
    """
    longer = max(chosen, rejected)
    if rule == "sequence":
        room = max_length - prompt
        return (prompt, min(chosen, room), min(rejected, room)) if room > 0 else None
    if prompt + longer <= max_length:
        return prompt, chosen, rejected
    if rule == "drop":
        return None
    prompt = min(prompt, max_prompt_length)
    if prompt + longer > max_length:
        room = max_length - (max_prompt_length if rule == "trl-0.7.4" else prompt)
        chosen, rejected = min(chosen, room), min(rejected, room)
    return prompt, chosen, rejected


def _batches(
    pairs: Sequence[Pair], kind: Callable[[Pair], Any]
) -> Iterator[tuple[Any, list[Pair]]]:
    """Runs of pairs of one kind, small enough to encode at once: (kind, pairs)."""
    for kind_of_run, run in groupby(pairs, key=kind):
        while batch := list(islice(run, PAIRS_AT_ONCE)):
            yield kind_of_run, batch


# ------------------------------------------------------------------------------------- "clean"


def _clean(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> Iterator[_Encoded]:
    guard = guard_of(tokenizer)
    checked: dict[str, int] = {}

    def kind(pair: Pair) -> tuple[bool, bool]:
        is_conversation = not isinstance(pair.prompt, str)
        return is_conversation, spells_added(without_ends(pair, tokenizer), tokenizer)

    for (is_conversation, spelled), batch in _batches(pairs, kind):
        texts = [_branch_texts(pair, tokenizer, system_prompt, checked) for pair in batch]
        branches = [prompt + answer for prompt, *answers in texts for answer in answers]
        # A conversation has the added tokens that its template writes; plain text the tokenizer's.
        encodings = iter(tokenizer(branches, add_special_tokens=not is_conversation).encodings)
        for pair, (prompt, *answers) in zip(batch, texts, strict=True):
            encoded = list(islice(encodings, len(answers)))
            ids = [encoding.ids for encoding in encoded]
            remark = AS_SPECIAL if spelled else None
            if is_conversation:
                written = [guard.written(prompt + answer) for answer in answers]
                if spelled or list(map(guard.added, ids)) != written:
                    hidden = guard.hide(without_ends(pair, tokenizer))
                    rendered = _branch_texts(hidden, tokenizer, system_prompt, checked)
                    (prompt, first), *marked = map(guard.mark, rendered)
                    plain = ids
                    encoded, ids = guard.encode([prompt + answer for answer, _ in marked])
                    written = [guard.added(first + rest) for _, rest in marked]
                    if list(map(guard.added, ids)) != written:
                        yield [[], [], []], FORGES
                        continue
                    remark = AS_TEXT if spelled or ids != plain else None
            both = zip(encoded, ids, strict=True)
            sides = [_split(*one, prompt, tokenizer, pair) for one in both]
            yield _join_branches(sides, tokenizer, pair), remark


def _join_branches(
    sides: list[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerFast, pair: Pair
) -> list[list[int]]:
    """The three parts of a pair from its branches (prompt tokens, response tokens).

    An implied prompt ends where the branches' tokens begin to differ.
    """
    if len(sides) == 1:
        return [*sides[0], []]
    (prompt, chosen), (other, rejected) = sides
    if pair.implied:
        common = len(commonprefix([prompt, other]))
        chosen, rejected = prompt[common:] + chosen, other[common:] + rejected
        prompt, other = prompt[:common], other[:common]
    if prompt != other:
        raise UserError(
            f"{pair.where}: the prompt's tokens differ between the two branches, "
            f"{tokenizer.decode(prompt[-20:])!r} and {tokenizer.decode(other[-20:])!r}; expected "
            "the same"
        )
    return [prompt, chosen, rejected]


def _split(
    encoding: Encoding, ids: list[int], prompt: str, tokenizer: PreTrainedTokenizerFast, pair: Pair
) -> tuple[list[int], list[int]]:
    """One encoded branch as (prompt tokens, response tokens), the response with one final EOS."""
    boundary = encoding.char_to_token(len(prompt))
    if boundary is None:  # the tokenizer swallows all that follows the prompt
        boundary = len(ids)
    elif encoding.token_to_chars(boundary)[0] < len(prompt) and not pair.implied:
        raise UserError(
            f"{pair.where}: the prompt is not a token prefix of its branch: the token "
            f"{tokenizer.convert_ids_to_tokens(ids[boundary])!r} covers the end of "
            f"{prompt[-40:]!r} and the response's beginning; expected the response to begin with "
            "a token of its own. If the columns are turns of a chat, give their source "
            '"format": "turns"; if the prompt ends in a space, move it to the response'
        )
    # A plain text may spell out the BOS that the tokenizer puts in front of it.
    begin = 1 if ids[:2] == [tokenizer.bos_token_id] * 2 else 0
    return ids[begin:boundary], _one_final_eos(ids[boundary:], tokenizer)


def _one_final_eos(response: list[int], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The response without EOS tokens and white space at its end, then exactly one EOS."""
    eos = tokenizer.eos_token_id
    while eos in response:
        last = len(response) - 1 - response[::-1].index(eos)
        if tokenizer.decode(response[last + 1 :]).strip():
            break
        response = response[:last]
    return [*response, eos]


# --------------------------------------------------------------------------------- "trl-0.7.4"


def _trl_0_7_4(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> Iterator[_Encoded]:
    checked: dict[str, int] = {}
    for special, batch in _batches(pairs, lambda pair: spells_added(pair, tokenizer)):
        texts = [_branch_texts(pair, tokenizer, system_prompt, checked) for pair in batch]
        flat = [text for branch in texts for text in branch]
        encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
        for branch in texts:
            parts = list(islice(encoded, len(branch)))
            responses = [[*response, tokenizer.eos_token_id] for response in parts[1:]]
            yield [parts[0], *responses, []][:3], AS_SPECIAL if special else None


# ------------------------------------------------------------------------------ the chat template


def _branch_texts(
    pair: Pair,
    tokenizer: PreTrainedTokenizerFast,
    system_prompt: str | None,
    checked: dict[str, int],
) -> list[str]:
    """The pair as text: the prompt up to where the answer begins, then each response.

    checked: how many messages of a row, by its origin, are known to be written by the template. In
    supervised fine-tuning each answer of a conversation is a pair, and continues the one before.
    """
    responses = [pair.chosen, pair.rejected] if pair.rejected else [pair.chosen]
    if isinstance(pair.prompt, str):
        return [pair.prompt, *responses]
    if not tokenizer.chat_template:
        raise UserError(
            f"{pair.where}: a conversation, but the tokenizer has no chat template; expected "
            "chat_template in its tokenizer_config.json, or rows of plain text"
        )
    messages = with_system_prompt(pair.prompt, system_prompt)
    given = {"tools": pair.tools, "options": pair.template_options}
    prompt = render(tokenizer, messages, pair.where, opens_answer=True, **given)
    texts = [prompt]
    for number, response in enumerate(responses):
        conversation = [*messages, *response]
        branch = render(tokenizer, conversation, pair.where, opens_answer=False, **given)
        if not branch.startswith(prompt):
            raise UserError(
                f"{pair.where}: the rendered prompt is not a prefix of its branch: the chat "
                f"template ends the prompt with {prompt[-40:]!r}, the branch continues "
                f"{branch[max(0, len(prompt) - 40) : len(prompt) + 20]!r}; expected the same text"
            )
        texts.append(branch[len(prompt) :])
        start = len(messages) if number else 0
        if not pair.rejected:
            start = checked.get(pair.where, 0)
        check_written(tokenizer, conversation, pair.where, start=start, **given)
    checked.clear()
    checked[pair.where] = len(messages) + len(pair.chosen)
    return texts
