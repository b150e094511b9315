"""Judging by a reward model: a sequence classifier with one label, on this project's decoder.

    python -m notus.feedback.reward responses.jsonl --model FOLDER_OR_ID --out scored
    torchrun --nproc_per_node 8 -m notus.feedback.reward ...       # the GPUs share the responses

While it runs, OUT.partial keeps every score; the same command resumes and computes only the others.
Each response is scored by itself, in a row of its own without padding, so its score depends on
nothing but the model and its conversation: not on a batch, other responses or the number of ranks.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from notus.console import run_command
from notus.data.messages import Message
from notus.data.packing import PROMPT, Layout
from notus.data.tokenization import render
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.engine.distributed import map_over_ranks
from notus.engine.log import progress
from notus.errors import UserError, agreed
from notus.feedback.record import Record, Score
from notus.feedback.responses import (
    Sampled,
    hash_of_rows,
    judge_parser,
    read_responses,
    write_rated,
)
from notus.files import read_object
from notus.model.attention import build_mask
from notus.model.hf_config import ModelShape, architecture_of, read_shape
from notus.model.hub import model_folder
from notus.model.mistral import Decoder
from notus.model.weights import hash_weights, load_weights, stored_tensors
from notus.strict import show

# A classifier's class, and that of the language model with the same decoder.
CLASSES = {
    "MistralForSequenceClassification": "MistralForCausalLM",
    "LlamaForSequenceClassification": "LlamaForCausalLM",
}
HEAD = "score.weight"


class RewardModel(nn.Module):
    """The decoder with one number per token; parameters are named as in transformers' classes."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.score = nn.Linear(shape.hidden_size, 1, bias=False)

    def forward(self, tokens_T: Tensor, row: int) -> Tensor:
        """The score of one conversation, tokens int64 [T], read off at slot `row`: a scalar."""
        slots = torch.arange(len(tokens_T), device=tokens_T.device, dtype=torch.int32)
        nothing = torch.zeros_like(slots)
        layout = Layout(nothing, nothing + PROMPT, slots, nothing.bool())
        mask = build_mask(layout, self.shape.sliding_window, "dense")
        rows = torch.tensor([row], device=tokens_T.device)
        return self.score(self.model(tokens_T, slots, mask, rows))[0, 0]


class Scorer(NamedTuple):
    """A reward model that is ready to score.

    pad: the token that transformers' class takes for padding, of which it skips the last ones.
    """

    model: RewardModel
    tokenizer: PreTrainedTokenizerFast
    pad: int | None
    device: torch.device

    @torch.inference_mode()
    def __call__(self, messages: Sequence[Message], where: str) -> float:
        """The score of the response that ends a conversation. Raises UserError."""
        text = render(self.tokenizer, messages, where, opens_answer=False)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        last = max((i for i, token in enumerate(ids) if token != self.pad), default=0)
        score = float(self.model(torch.tensor(ids, device=self.device), last))
        if score - score != 0:
            raise UserError(f"{where}: the score is {score}; expected a finite number")
        return score


def open_reward_model(name: str) -> tuple[Path, ModelShape, int | None]:
    """The folder of a reward model, its decoder's shape and its padding token.

    Raises UserError for another architecture, code of its own, or other than one label.
    """
    folder = model_folder(name)
    path = folder / "config.json"
    config = read_object(path)
    found, pad = architecture_of(config), config.get("pad_token_id")
    if "auto_map" in config:
        raise UserError(
            f"{path}: the model brings code of its own (auto_map), which is never run here; "
            f"expected {' or '.join(CLASSES)}"
        )
    if found not in tuple(CLASSES):
        raise UserError(f"{path}: architecture is {found}, expected {' or '.join(CLASSES)}")
    if type(pad) not in (int, NoneType):
        raise UserError(f"{path}: pad_token_id: found {show(pad)}, expected an integer or null")
    head = stored_tensors(folder).get(HEAD)
    if head is None or head.shape[:1] != (1,):
        labels = "no score" if head is None else f"{head.shape[0]} labels"
        raise UserError(f"{folder}: found {labels} ({HEAD}), expected a model with one label")
    with TemporaryDirectory() as place:  # read_shape knows language models
        decoder = json.dumps(config | {"architectures": [CLASSES[found]]})
        (Path(place) / path.name).write_text(decoder)
        try:
            shape = read_shape(Path(place))
        except UserError as error:
            raise UserError(str(error).replace(place, str(folder))) from None
    return folder, shape, pad


def load_scorer(
    folder: Path, shape: ModelShape, pad: int | None, device: torch.device, dtype: torch.dtype
) -> Scorer:
    """The reward model in `folder` with its tokenizer. Raises UserError."""
    tokenizer = load_tokenizer(folder, shape.vocab_size)
    if not tokenizer.chat_template:
        raise UserError(f"{folder}: the tokenizer has no chat template; expected one")
    with torch.device(device):
        model = RewardModel(shape).eval()
    load_weights(model, folder)
    return Scorer(model.to(dtype), tokenizer, pad, device)


def score_all(
    sampled: Sequence[Sampled], score: Scorer, record: Record[Score]
) -> list[list[float]]:
    """The scores of all rows' responses; each rank computes a share of those not on record.

    Collective.
    """
    keys = [(row, n) for row, one in enumerate(sampled) for n in range(len(one.distinct))]

    def share(part: Sequence[tuple[int, int]]) -> dict[tuple[int, ...], Score]:
        with progress(len(part), 0, "response") as bar:
            for row, number in part:
                one = sampled[row]
                found = score(one.answered(one.distinct[number]), one.where)
                record.add(Score(row, number, found))
                bar.update()
        return record.answers

    known: dict[tuple[int, ...], Score] = {}
    for part in map_over_ranks([key for key in keys if key not in record.answers], share):
        known |= part
    return [
        [known[row, one.distinct.index(response)].score for response in one.responses]
        for row, one in enumerate(sampled)
    ]


def judge(options: argparse.Namespace) -> str:
    """Score the responses of a file into the new folder of --out; returns a line. Collective."""
    ranks = distributed.start()
    with agreed():
        sampled = read_responses(options.responses)
        opened = open_reward_model(options.model)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
        scorer = load_scorer(*opened, ranks.device, dtype)
    settings = {
        "judge": "reward model",
        "model": options.model,
        "model_sha256": hash_weights(options.model, opened[0])["sha256"],
        "dtype": options.dtype,
        "responses": options.responses,
        "rows_sha256": hash_of_rows(sampled),
    }
    partial_folder = options.out.with_name(f"{options.out.name}.partial")
    with agreed():  # every rank has read the folder before any rank writes
        record = Record(partial_folder, settings, Score, ranks.rank)
    try:
        scores = score_all(sampled, scorer, record)
    finally:
        record.close()
    rows = [one.row | {"ratings": own} for one, own in zip(sampled, scores, strict=True)]
    flat = [score for own in scores for score in own]
    mean = sum(flat) / len(flat)
    counts = {"rows": len(rows), "rated": len(flat), "mean rating": mean}
    with agreed():
        if ranks.first:
            write_rated(options.out, rows, settings | counts)
            rmtree(partial_folder)
    return f"wrote {options.out}: {len(flat):,} scores, {mean:.4f} on average"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = judge_parser("reward", "Score sampled responses by a reward model.")
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face folder or hub id, a classifier of one label")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    try:
        return run_command(lambda: judge(parser.parse_args(arguments)))
    finally:
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main())
