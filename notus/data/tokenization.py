"""Pairs of text or conversations -> token ids, split exactly where the response begins.

"clean" renders each branch as one text, encodes it once, and finds the boundary by character
offsets, so the tokens are those the model meets when it answers. "trl-0.7.4" is what Zephyr and
Notus were trained with: the three texts encoded apart (a response then begins with the tokenizer's
dummy prefix), every end-of-sequence token inside them hidden from attention, one more appended.

Special tokens that a message spells out are characters under "clean": only the template makes
turns. In plain text, which brings its own, and under "trl-0.7.4" they are special. Either way such
pairs are counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import jinja2
import numpy as np
import sentencepiece
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from notus.data.formats import Message, Pair
from notus.data.special_tokens import guard_of, spells_special, without_ends
from notus.errors import UserError

Kind = TypeVar("Kind")

PAIRS_AT_ONCE = 256  # handed to the tokenizer's own threads in one call

AS_TEXT = "with special-token text in content, read as text"
AS_SPECIAL = "with special-token text in content, read as special tokens"


@dataclass(frozen=True)
class TokenizedPairs:
    """All pairs of a data set in three flat arrays; pair i is prompt, chosen, rejected in a row.

    tokens: int32, every pair's tokens one after another. hidden: bool, same shape, True for tokens
    outside attention. lengths: int64 [pairs, 3], tokens of prompt, chosen, rejected.
    """

    tokens: np.ndarray
    hidden: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each part begins in `tokens`: int64 [pairs, 3]."""
        ends = self.lengths.reshape(-1).cumsum()
        return (ends - self.lengths.reshape(-1)).reshape(-1, 3)

    @cached_property
    def response_starts(self) -> np.ndarray:
        """Where each pair begins in a flat array of all response tokens: int64 [pairs + 1].

        The order is that of `tokens` without the prompts; the last entry is the total.
        """
        return np.concatenate(([0], self.lengths[:, 1:].sum(1).cumsum()))

    def select(self, indices: Sequence[int] | np.ndarray) -> "TokenizedPairs":
        """The pairs `indices`, in that order."""
        spans = [
            np.arange(start, start + n)
            for start, n in zip(self.starts[indices, 0], self.lengths[indices].sum(1), strict=True)
        ]
        positions = np.concatenate([np.zeros(0, np.int64), *spans])
        return TokenizedPairs(self.tokens[positions], self.hidden[positions], self.lengths[indices])

    def fingerprint(self) -> str:
        """SHA-256 of the pairs: any other token, length or order gives another."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.hidden, self.lengths):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    def parts(self, pair: int) -> list[slice]:
        """The slices of `tokens` that hold the pair's prompt, chosen and rejected response."""
        pieces = zip(self.starts[pair], self.lengths[pair], strict=True)
        return [slice(start, start + length) for start, length in pieces]

    @classmethod
    def join(cls, parts: Sequence["TokenizedPairs"]) -> "TokenizedPairs":
        """The pairs of all parts, in order."""
        return cls(
            tokens=np.concatenate([part.tokens for part in parts]),
            hidden=np.concatenate([part.hidden for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
        )


class Tokenized(NamedTuple):
    """What became of the input pairs.

    pairs: those to train on. kept: int64, each one's place in the input. inputs: pairs given.
    whole_lengths: int64 [pairs, 3], as pairs.lengths, before truncation. counts: how many were
    "dropped: <reason>", had parts that were "cut: <part>", or are AS_TEXT or AS_SPECIAL. examples:
    the place in the input of the first pair under each count.
    """

    pairs: TokenizedPairs
    kept: np.ndarray
    inputs: int
    whole_lengths: np.ndarray
    counts: dict[str, int]
    examples: dict[str, int]

    @classmethod
    def join(cls, parts: Sequence["Tokenized"]) -> "Tokenized":
        """The result for a data set from those for consecutive shares of it."""
        shifts = np.cumsum([0, *(part.inputs for part in parts[:-1])])
        counts: Counter[str] = Counter()
        examples: dict[str, int] = {}
        for part, shift in zip(parts, shifts, strict=True):
            counts.update(part.counts)
            examples = {name: int(i + shift) for name, i in part.examples.items()} | examples
        return cls(
            TokenizedPairs.join([part.pairs for part in parts]),
            np.concatenate([p.kept + shift for p, shift in zip(parts, shifts, strict=True)]),
            sum(part.inputs for part in parts),
            np.concatenate([part.whole_lengths for part in parts]),
            dict(counts),
            examples,
        )


class _Branches(NamedTuple):
    """One pair's token ids, with a flag for each: True where the token is outside attention.

    remark: what is to be counted of the pair besides.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    hidden: tuple[list[bool], list[bool], list[bool]]
    remark: str | None


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, from an unchanged tokenizer.json or from tokenizer.model.

    vocab_size: the model's, if the tokenizer is to be checked against it.

    Not AutoTokenizer: for Llama-type tokenizers transformers 5 rebuilds the normaliser, and from a
    tokenizer.model also the merges, after which runs of spaces split otherwise than in training.
    Raises UserError when the folder has neither file, when it names no end-of-sequence token, and
    when the tokenizer has more tokens than the model.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            _check_tokenizer_json(folder / "tokenizer.json")
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        elif (folder / "tokenizer.model").is_file():
            backend = sentencepiece_backend(folder / "tokenizer.model")
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=backend)
        else:
            raise UserError(f"{folder}: no tokenizer.json or tokenizer.model; expected a tokenizer")
    except (json.JSONDecodeError, OSError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}/tokenizer_config.json: no eos_token; expected one")
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is "
            f"{vocab_size}; expected at least as many"
        )
    return tokenizer


def _check_tokenizer_json(path: Path) -> None:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this very class, never a narrower one
        raise UserError(
            f"{path}: the tokenizer cannot be read ({error}); expected a file that the tokenizers "
            "library wrote"
        ) from None


def sentencepiece_backend(path: Path) -> Tokenizer:
    """A fast tokenizer equal to the sentencepiece BPE model at `path`, with its offsets.

    For models with Llama's settings: text taken as it is, a space put in front, byte fallback.
    Raises UserError when the file is not a sentencepiece model.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not a sentencepiece model ({error})") from None
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    bpe = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        sentencepiece_merges(model),
        unk_token=pieces[model.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [model.unk_id(), model.bos_id(), model.eos_id()]
    tokenizer.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in special])
    bos = pieces[model.bos_id()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, model.bos_id())]
    )
    return tokenizer


def sentencepiece_merges(
    model: sentencepiece.SentencePieceProcessor,
) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model, in the order in which they are to be applied.

    sentencepiece joins the adjacent pair whose joined piece has the best score, so they are all
    splits of every piece into two known pieces, best piece first.
    """
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue  # no text is ever joined into one of these
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        known.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-model.get_score(i), pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores keep the pieces' order
    return [pair for _, pair in merges]


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

    A pair without a rejected response has none in the result. Raises UserError, showing the pair,
    when its prompt is not a prefix of both branches, in text or in tokens, and when a conversation
    meets a tokenizer without a chat template.
    """
    branches = _clean if style == "clean" else _trl_0_7_4
    tokens: list[int] = []
    hidden: list[bool] = []
    lengths: list[tuple[int, int, int]] = []
    whole_lengths: list[tuple[int, int, int]] = []
    kept: list[int] = []
    counts: Counter[str] = Counter()
    examples: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] += 1
        examples.setdefault(name, index)

    # Without a rejected response (supervised fine-tuning) the chosen one stands in for it.
    whole = [pair if pair.rejected else replace(pair, rejected=pair.chosen) for pair in pairs]
    for index, ids in enumerate(branches(whole, tokenizer, system_prompt)):
        if not pairs[index].rejected:
            ids = ids._replace(rejected=[], hidden=(*ids.hidden[:2], []))
        full = (len(ids.prompt), len(ids.chosen), len(ids.rejected))
        if ids.remark:
            count(ids.remark)
        if full[0] == 0:
            count("dropped: empty prompt")
            continue
        cut = truncate(
            *full,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            rule="trl-0.7.4" if style == "trl-0.7.4" else truncation,
        )
        if cut is None:
            count("dropped: longer than max_length")
            continue
        if style == "clean" and ids.chosen[: cut[1]] == ids.rejected[: cut[2]]:
            count("dropped: identical responses after truncation")
            continue
        for name, before, after in zip(("prompt", "chosen", "rejected"), full, cut, strict=True):
            if after < before:
                count(f"cut: {name}")
        has_bos = style == "clean" and ids.prompt[0] == tokenizer.bos_token_id
        kept_prompt = _keep_end(full[0], cut[0], has_bos)
        tokens += [ids.prompt[i] for i in kept_prompt]
        tokens += ids.chosen[: cut[1]] + ids.rejected[: cut[2]]
        hidden += [ids.hidden[0][i] for i in kept_prompt]
        hidden += ids.hidden[1][: cut[1]] + ids.hidden[2][: cut[2]]
        lengths.append(cut)
        whole_lengths.append(full)
        kept.append(index)
    return Tokenized(
        TokenizedPairs(
            np.array(tokens, dtype=np.int32),
            np.array(hidden, dtype=bool),
            np.array(lengths, dtype=np.int64).reshape(-1, 3),
        ),
        np.array(kept, dtype=np.int64),
        len(pairs),
        np.array(whole_lengths, dtype=np.int64).reshape(-1, 3),
        dict(counts),
        examples,
    )


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


def _keep_end(length: int, keep: int, has_bos: bool) -> list[int]:
    """Indices of the last `keep` of `length` prompt tokens; a cut prompt keeps its BOS in front."""
    if has_bos and keep < length:
        return [0, *range(length - keep + 1, length)]
    return list(range(length - keep, length))


def _batches(
    pairs: Sequence[Pair], kind: Callable[[Pair], Kind]
) -> Iterator[tuple[Kind, list[Pair]]]:
    """Runs of pairs of one kind, small enough to encode at once: (kind, pairs)."""
    for kind_of_run, run in groupby(pairs, key=kind):
        while batch := list(islice(run, PAIRS_AT_ONCE)):
            yield kind_of_run, batch


def _is_conversation(pair: Pair) -> bool:
    return not isinstance(pair.prompt, str)


def _clean(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> Iterator[_Branches]:
    def kind(pair: Pair) -> tuple[bool, bool]:
        return _is_conversation(pair), spells_special(without_ends(pair, tokenizer), tokenizer)

    for (conversational, special), batch in _batches(pairs, kind):
        if conversational and special:
            yield from _clean_guarded(batch, tokenizer, system_prompt)
            continue
        texts = [_branch_texts(pair, tokenizer, system_prompt) for pair in batch]
        # A conversation has the special tokens its template writes; plain text the tokenizer's.
        encoded = tokenizer(
            [prompt + response for prompt, *responses in texts for response in responses],
            add_special_tokens=not conversational,
            return_attention_mask=False,
            return_token_type_ids=False,
        ).encodings
        for i, (pair, (prompt, *_)) in enumerate(zip(batch, texts, strict=True)):
            sides = [
                _split(encoding, encoding.ids, prompt, tokenizer, pair)
                for encoding in encoded[2 * i : 2 * i + 2]
            ]
            yield _clean_branches(*sides, tokenizer, pair, AS_SPECIAL if special else None)


def _clean_guarded(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> Iterator[_Branches]:
    """Conversations that spell out special tokens, which are to be text."""
    guard = guard_of(tokenizer)
    broken = [guard.break_up(without_ends(pair, tokenizer)) for pair in pairs]
    for pair, to_render in zip(pairs, broken, strict=True):
        texts = _branch_texts(to_render, tokenizer, system_prompt)
        prompt, *responses = map(guard.mark, texts)
        encoded = guard.backend.encode_batch(
            [prompt + response for response in responses], add_special_tokens=False
        )
        sides = [
            _split(encoding, guard.restore(encoding.ids), prompt, tokenizer, pair)
            for encoding in encoded
        ]
        tight = all(guard.is_tight(encoding.ids) for encoding in encoded)
        yield _clean_branches(*sides, tokenizer, pair, AS_TEXT if tight else AS_SPECIAL)


def _clean_branches(
    chosen: tuple[list[int], list[int]],
    rejected: tuple[list[int], list[int]],
    tokenizer: PreTrainedTokenizerFast,
    pair: Pair,
    remark: str | None,
) -> _Branches:
    """A pair from its two branches, each (prompt tokens, response tokens).

    An implied prompt ends where the branches' tokens part.
    """
    if pair.implied:
        same = [a == b for a, b in zip(chosen[0], rejected[0], strict=False)]
        common = (*same, False).index(False)
        chosen, rejected = (
            (prompt[:common], prompt[common:] + response) for prompt, response in (chosen, rejected)
        )
    if chosen[0] != rejected[0]:
        raise UserError(
            f"{pair.where}: the prompt's tokens differ between the two branches, "
            f"{_tail(tokenizer, chosen[0])} and {_tail(tokenizer, rejected[0])}; "
            "expected the same"
        )
    ids = (chosen[0], chosen[1], rejected[1])
    return _Branches(*ids, hidden=tuple([False] * len(part) for part in ids), remark=remark)


def _split(
    encoding: Encoding,
    ids: list[int],
    prompt: str,
    tokenizer: PreTrainedTokenizerFast,
    pair: Pair,
) -> tuple[list[int], list[int]]:
    """One encoded branch as (prompt tokens, response tokens), the response with one final EOS."""
    boundary = encoding.char_to_token(len(prompt))
    if boundary is None:  # nothing follows the prompt but what the tokenizer swallows
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
    """The response without EOS and white space after it at its end, then exactly one EOS."""
    eos = tokenizer.eos_token_id
    while eos in response:
        last = len(response) - 1 - response[::-1].index(eos)
        if tokenizer.decode(response[last + 1 :]).strip():
            break
        response = response[:last]
    return [*response, eos]


def _tail(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return repr(tokenizer.decode(ids[-20:]))


def _trl_0_7_4(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> Iterator[_Branches]:
    eos = tokenizer.eos_token_id
    for special, batch in _batches(pairs, lambda pair: spells_special(pair, tokenizer)):
        texts = [_branch_texts(pair, tokenizer, system_prompt) for pair in batch]
        flat = [text for branch in texts for text in branch]
        encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
        for _ in batch:
            prompt, chosen, rejected = next(encoded), next(encoded), next(encoded)
            hidden = tuple([token == eos for token in part] for part in (prompt, chosen, rejected))
            for part, flags in zip((chosen, rejected), hidden[1:], strict=True):
                part.append(eos)
                flags.append(False)
            remark = AS_SPECIAL if special else None
            yield _Branches(prompt, chosen, rejected, hidden, remark)


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The conversation, begun with `system_prompt` if that is given and no system turn is there."""
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _branch_texts(
    pair: Pair, tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> tuple[str, str, str]:
    """The pair as text: the prompt up to where the answer begins, then both answers."""
    if isinstance(pair.prompt, str):
        return pair.prompt, pair.chosen, pair.rejected
    if not tokenizer.chat_template:
        raise UserError(
            f"{pair.where}: a conversation, but the tokenizer has no chat template; expected "
            "chat_template in its tokenizer_config.json, or rows of plain text"
        )
    messages = with_system_prompt(pair.prompt, system_prompt)
    prompt = _render(tokenizer, messages, pair, add_generation_prompt=True)
    answers = []
    for answer in (pair.chosen, pair.rejected):
        branch = _render(tokenizer, [*messages, *answer], pair, add_generation_prompt=False)
        if not branch.startswith(prompt):
            raise UserError(
                f"{pair.where}: the rendered prompt is not a prefix of its branch: the chat "
                f"template ends the prompt with {prompt[-40:]!r}, the branch continues "
                f"{branch[max(0, len(prompt) - 40) : len(prompt) + 20]!r}; expected the same text"
            )
        answers.append(branch[len(prompt) :])
    return prompt, answers[0], answers[1]


def _render(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    pair: Pair,
    add_generation_prompt: bool,
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    # A template may refuse roles or their order, or compute what the row's values do not allow.
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(f"{pair.where}: the chat template refuses this row: {error}") from None
