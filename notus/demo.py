"""The demo's data and its small SFT policy, made from nothing: `python -m notus.demo [--out demo]`.

It writes, without network and the same bytes each time on one machine:

    preferences.jsonl  training rows in the raw UltraFeedback schema
    heldout.jsonl      the same for instructions that preferences.jsonl does not hold
    prompts.jsonl      {"prompt": [{"role", "content"}], "answer"} for held-out instructions
    sft.jsonl          {"messages": [{"role", "content"}]}, what the policy is trained on, in order
    init/              a Hugging Face folder: a random Mistral of about one million parameters
    sft/               the same after `train.py configs/demo-sft.json`, in bfloat16

The tasks are checkable: sums, comparing numbers, the alphabet, opposites and spelling. An answer is
right when it is the expected text and nothing else (`generate.samples.is_right`). The policy is
trained by maximum likelihood, first on right answers, which is where its knowledge comes from, then
on answers of mixed quality (`SFT_SHARES`), so that about half of what it samples is right; what a
preference run adds to that is the preference run's own doing. Held-out instructions are new
strings, but their facts may have been seen in another phrasing: a model of this size knows what it
was told.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import sentencepiece
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from notus.data.tokenizer import sentencepiece_merges
from notus.errors import UserError

SEED = 42
ROOT = Path(__file__).parents[1]  # of the repository, where train.py and configs/ are


# Questions


class Question(NamedTuple):
    """An instruction, its only right answer, and answers that are wrong but of the right kind."""

    instruction: str
    answer: str
    wrong: tuple[str, ...]


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
OPPOSITES = (
    "hot cold, big small, up down, day night, wet dry, fast slow, old young, hard soft, high low, "
    "open shut, full empty, light dark, left right, rich poor, happy sad, early late, long short, "
    "near far, thick thin, clean dirty, strong weak, first last, good bad, in out, loud quiet, "
    "wide narrow, deep shallow, push pull, win lose, begin end"
)
WORDS = (
    "cat dog sun hat pen cup box bed map key tree fish bird book milk rain snow star moon ship "
    "lamp door hand foot king rose leaf wolf bear duck frog goat lion corn salt wind gold ring "
    "drum flag bread horse house mouse river stone table chair green water plant train cloud"
)
PHRASINGS = {
    "sum": (
        "What is {0} plus {1}?",
        "Add {0} and {1}.",
        "{0} + {1} = ?",
        "How much is {0} and {1}?",
    ),
    "larger": (
        "Which is larger, {0} or {1}?",
        "Name the larger number: {0}, {1}.",
        "Is {0} or {1} more?",
    ),
    "after": (
        "Which letter comes after {0}?",
        "Name the letter after {0}.",
        "What follows {0} in the alphabet?",
        "In the alphabet, what is next after {0}?",
    ),
    "before": (
        "Which letter comes before {0}?",
        "Name the letter before {0}.",
        "What precedes {0} in the alphabet?",
        "In the alphabet, what is just before {0}?",
    ),
    "opposite": (
        "What is the opposite of {0}?",
        "Give the opposite of {0}.",
        "Which word means the opposite of {0}?",
        "Name the opposite: {0}.",
    ),
    "spell": (
        "Spell the word {0}.",
        "How do you spell {0}?",
        "Spell {0}.",
        "What are the letters of {0}?",
    ),
    "first": (
        "What is the first letter of {0}?",
        "Which letter does {0} start with?",
        "Name the first letter of {0}.",
    ),
    "last": (
        "What is the last letter of {0}?",
        "Which letter does {0} end with?",
        "Name the last letter of {0}.",
    ),
}


def spelled(letters: Iterable[str]) -> str:
    return "-".join(letters)


def facts(rng: random.Random) -> Iterator[tuple[str, tuple[str, ...], str, tuple[str, ...]]]:
    """Yield (task, words that fill the phrasing, right answer, wrong answers)."""
    for a, b in product(range(1, 11), repeat=2):
        near = [a + b + d for d in (-2, -1, 1, 2) if a + b + d > 0]
        yield "sum", (str(a), str(b)), str(a + b), tuple(map(str, near))
    unequal = [(a, b) for a, b in product(range(1, 31), repeat=2) if a != b]
    for a, b in rng.sample(unequal, 220):
        small, large = sorted((a, b))
        yield "larger", (str(a), str(b)), str(large), (str(small),)
    for i, letter in enumerate(ALPHABET):
        others = [ALPHABET[j] for j in (i - 2, i - 1, i + 1, i + 2) if 0 <= j < len(ALPHABET)]
        for task, j in (("after", i + 1), ("before", i - 1)):
            if 0 <= j < len(ALPHABET):
                wrong = tuple(other for other in others if other != ALPHABET[j])
                yield task, (letter,), ALPHABET[j], wrong
    pairs = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]
    adjectives = [word for pair in pairs for word in pair]
    for pair in pairs:
        for word, opposite in (pair, pair[::-1]):
            others = [other for other in adjectives if other not in pair]
            yield "opposite", (word,), opposite, tuple(rng.sample(others, 3))
    for word in WORDS.split():
        swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
        misspelt = tuple(spelled(letters) for letters in swapped if letters != word)
        yield "spell", (word,), spelled(word), misspelt
        for task, letter in (("first", word[0]), ("last", word[-1])):
            yield task, (word,), letter, tuple(sorted(set(word) - {letter}))


def all_questions(rng: random.Random) -> list[Question]:
    """Every fact in every phrasing, shuffled; all instructions differ."""
    questions = [
        Question(phrasing.format(*words), answer, wrong)
        for task, words, answer, wrong in facts(rng)
        for phrasing in PHRASINGS[task]
    ]
    rng.shuffle(questions)
    return questions


# Completions and their ratings


class Kind(NamedTuple):
    """A quality of answer: who gives it, its ratings and what a critic says of it."""

    model: str
    ratings: tuple[int, int, int, int]  # in the order of ASPECTS, 1..5
    critique: str


ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
KINDS = {
    "right": Kind("demo-careful", (5, 5, 5, 5), "Right, and nothing is said beyond the answer."),
    "rambling": Kind("demo-chatty", (4, 4, 5, 3), "The answer is there, but buried in talk."),
    "wrong": Kind("demo-hasty", (3, 2, 1, 1), "It answers the question, wrongly."),
    "wrong again": Kind("demo-sloppy", (3, 2, 1, 1), "A wrong answer given with confidence."),
    "off-topic": Kind("demo-dreamer", (1, 2, 2, 1), "It does not answer the question."),
}
RIGHT_FIRST = 0.7  # share of the policy's training rows, from the start, that are right
SFT_SHARES = {"right": 0.6, "rambling": 0.1, "wrong": 0.2, "off-topic": 0.1}
RAMBLING = (
    "That is a good question. It could be {0}, I think.",
    "Let me think about it. Some people say {0}.",
    "Well, it is {0}, or so I was told.",
    "I am glad you asked. Maybe it is {0}.",
)
OFF_TOPIC = (
    "I like rainy days.",
    "My soup is getting cold.",
    "The train was late again.",
    "Have you seen my hat?",
)


def response(question: Question, kind: str, rng: random.Random) -> str:
    if kind == "right":
        return question.answer
    if kind == "rambling":
        return rng.choice(RAMBLING).format(question.answer)
    if kind == "off-topic":
        return rng.choice(OFF_TOPIC)
    return rng.choice(question.wrong)


def noisy_ratings(kind: str, rng: random.Random) -> list[int]:
    """The kind's ratings with, three times in ten, one aspect off by one.

    The mean moves by at most 0.25, so a right answer's mean (>= 4.75) stays above a rambling one's
    (<= 4.25), and that above the others' (<= 2.0).
    """
    ratings = list(KINDS[kind].ratings)
    if rng.random() < 0.3:
        aspect = rng.randrange(len(ratings))
        ratings[aspect] = min(5, max(1, ratings[aspect] + rng.choice((-1, 1))))
    return ratings


def completion(kind: str, text: str, planted: bool, rng: random.Random) -> dict[str, Any]:
    """One completion in the raw UltraFeedback schema; `planted` gives it the overall score 10.

    The published set holds such scores: a critic's 1 was read as 10 (OpenBMB/UltraFeedback,
    issue 8). The ratings of the four aspects are not affected.
    """
    ratings = noisy_ratings(kind, rng)
    mean = sum(ratings) / len(ratings)
    annotations = {}
    for aspect, rating in zip(ASPECTS, ratings, strict=True):
        annotation = {"Rating": str(rating), "Rationale": KINDS[kind].critique}
        if aspect in ("truthfulness", "helpfulness"):
            annotation = {"Type": ["None"], **annotation}
            annotation["Rationale For Rating"] = KINDS[kind].critique
        annotations[aspect] = annotation
    return {
        "model": KINDS[kind].model,
        "principle": "helpfulness",
        "custom_system_prompt": "",
        "response": text,
        "critique": KINDS[kind].critique,
        "overall_score": 10.0 if planted else float(math.floor(2 * mean - 0.5)),
        "fine-grained_score": mean,
        "annotations": annotations,
    }


def preference_row(question: Question, rng: random.Random) -> dict[str, Any]:
    """A raw UltraFeedback row: a right completion and three worse ones, all different, any order.

    In one row of twelve a wrong or off-topic completion gets a planted overall score of 10.
    """
    second = ["wrong again"] if len(question.wrong) > 1 else []
    kinds = ["right", *rng.sample(["rambling", "wrong", "off-topic", *second], 3)]
    texts = {kind: response(question, kind, rng) for kind in kinds}
    if "wrong" in texts and "wrong again" in texts:
        texts["wrong"], texts["wrong again"] = rng.sample(question.wrong, 2)
    rng.shuffle(kinds)
    bad = [kind for kind in kinds if kind not in ("right", "rambling")]
    planted = rng.choice(bad) if rng.random() < 1 / 12 else None
    return {
        "source": "notus_demo",
        "instruction": question.instruction,
        "models": [KINDS[kind].model for kind in kinds],
        "completions": [completion(k, texts[k], k == planted, rng) for k in kinds],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


class DemoData(NamedTuple):
    train: list[dict[str, Any]]  # raw UltraFeedback rows
    heldout: list[dict[str, Any]]  # the same, other instructions
    prompts: list[dict[str, Any]]  # {"prompt", "answer"}, instructions of `heldout`
    sft: list[dict[str, Any]]  # {"messages"} of training instructions, in order


def sft_rows(questions: Sequence[Question], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Conversations of one question: RIGHT_FIRST of them right answers, the rest of mixed quality.

    The questions are gone through in passes, each in a new order.
    """
    rows = []
    while len(rows) < count:
        for question in rng.sample(questions, len(questions)):
            kind = "right"
            if len(rows) >= RIGHT_FIRST * count:
                kind = rng.choices(list(SFT_SHARES), list(SFT_SHARES.values()))[0]
            asked = {"role": "user", "content": question.instruction}
            told = {"role": "assistant", "content": response(question, kind, rng)}
            rows.append({"messages": [asked, told]})
    return rows[:count]


def make_data(rows: int | None = None, sft_count: int = 0, seed: int = SEED) -> DemoData:
    """Draw the demo's data; a pure function of its arguments.

    rows: how many training instructions to keep (None: all of them, about two thousand). A tenth of
    all questions is held out first, also cut to `rows`. sft_count: rows to draw for the policy.
    """
    rng = random.Random(seed)
    questions = all_questions(rng)
    tenth = len(questions) // 10
    heldout, train = questions[:tenth][:rows], questions[tenth:][:rows]
    return DemoData(
        train=[preference_row(question, rng) for question in train],
        heldout=[preference_row(question, rng) for question in heldout],
        prompts=[
            {"prompt": [{"role": "user", "content": q.instruction}], "answer": q.answer}
            for q in heldout
        ],
        sft=sft_rows(train, sft_count, rng),
    )


# Tokenizer

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# Each turn is its role's marker, a newline, the text, the end-of-sequence token and a newline, the
# layout that Zephyr was trained with. No BOS: neither the template nor the tokenizer adds one.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def train_sentencepiece(
    texts: Iterable[str], vocabulary: int
) -> sentencepiece.SentencePieceProcessor:
    """A BPE model with Mistral's conventions: digits apart, byte fallback, <unk> <s> </s> = 0 1 2.

    The role markers are single pieces, to keep the demo's sequences short, and no space is put in
    front of a text: in a chat every text follows a newline. A small corpus gives fewer pieces than
    `vocabulary`.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=list(ROLES),
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def to_fast_tokenizer(
    processor: sentencepiece.SentencePieceProcessor,
) -> PreTrainedTokenizerFast:
    """The same segmentation as `processor`, with offsets and a chat template."""
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            sentencepiece_merges(processor),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


# Policy


def random_policy(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, seed: int
) -> MistralForCausalLM:
    """A Mistral of four layers that has learned nothing: float32, drawn by `seed`."""
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=None,
        initializer_range=0.06,  # the usual 0.02 is for wide models: this one would learn late
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MistralForCausalLM(config)


def train_policy(folder: Path, batch_size: int, seed: int) -> dict[str, torch.Tensor]:
    """The weights that train.py makes of `folder`/init, bfloat16, by their names in the model.

    One pass over `folder`/sft.jsonl by configs/demo-sft.json, in a process of its own.
    Raises UserError when train.py is not there, or has failed; it has then said why.
    """
    script = ROOT / "train.py"
    if not script.is_file():
        raise UserError(
            f"{script}: not found, and it trains the demo's policy; run the demo from a clone of "
            "the repository, installed with: pip install -e ."
        )
    place = folder.resolve()
    with TemporaryDirectory() as temporary:
        output = Path(temporary) / "run"
        command = [
            sys.executable,
            str(script),
            str(ROOT / "configs/demo-sft.json"),
            f"model.policy={place / 'init'}",
            f"data.train.0.path={place / 'sft.jsonl'}",
            f"data.eval.0.path={place / 'heldout.jsonl'}",
            f"evaluation.samples.prompts={place / 'prompts.jsonl'}",
            f"train.pairs_per_step={batch_size}",
            f"train.seed={seed}",
            f"output_dir={output}",
        ]
        # The number of threads decides the order of float additions, so it is part of the result.
        # And where other work keeps a core busy, two threads that wait for each other are slow.
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"the policy was not trained: {script} ended with {done.returncode}")
        weights = {}
        for file in (output / "final").glob("*.safetensors"):
            weights |= load_file(file)
        return weights


# Folder

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
FILES = {
    "preferences.jsonl",
    "heldout.jsonl",
    "prompts.jsonl",
    "sft.jsonl",
    *(f"init/{name}" for name in MODEL_FILES),
    *(f"sft/{name}" for name in MODEL_FILES),
}


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is missing, empty or holds only the demo's own files."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the demo is written into a folder")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in {"init", "sft", *FILES}:
            raise UserError(
                f"{folder} holds {name}, which is not the demo's; give another folder with --out"
            )


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def save_model(folder: Path, model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    # The template goes into tokenizer_config.json, where older readers look for it too.
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def write_demo(
    folder: Path | str,
    rows: int | None = None,
    sft_steps: int = 600,
    hidden_size: int = 128,
    vocabulary: int = 900,
    batch_size: int = 32,
    seed: int = SEED,
) -> None:
    """Write the whole demo into `folder`.

    Small arguments (rows=64, sft_steps=2, hidden_size=16) give a folder of the same layout in a few
    seconds, with a policy that answers nothing; with sft_steps=0 it is the initial model, in a
    second. A demo already there is written over. Raises UserError when the folder holds anything
    else, or the policy cannot be trained.
    """
    folder = Path(folder)
    check_folder(folder)
    shutil.rmtree(folder / "sft", ignore_errors=True)  # nobody takes an old policy for a new one
    folder.mkdir(parents=True, exist_ok=True)
    data = make_data(rows, sft_steps * batch_size, seed)
    write_jsonl(folder / "preferences.jsonl", data.train)
    write_jsonl(folder / "heldout.jsonl", data.heldout)
    write_jsonl(folder / "prompts.jsonl", data.prompts)
    write_jsonl(folder / "sft.jsonl", data.sft)
    texts = [
        text
        for row in data.train
        for text in (row["instruction"], *(c["response"] for c in row["completions"]))
    ]
    tokenizer = to_fast_tokenizer(train_sentencepiece(texts, vocabulary))
    model = random_policy(tokenizer, hidden_size, seed)
    save_model(folder / "init", model, tokenizer)
    if sft_steps:
        model.to(torch.bfloat16).load_state_dict(train_policy(folder, batch_size, seed))
    save_model(folder / "sft", model, tokenizer)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notus.demo", description="Write the demo.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    folder = parser.parse_args(arguments).out
    logging.disable_progress_bar()
    print(
        f"Writing {folder}: data, a tokenizer and a small SFT policy (a minute or two)", flush=True
    )
    try:
        write_demo(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {', '.join(sorted(FILES))} into {folder}.")
    print("Next: torchrun --nproc_per_node 2 train.py configs/demo.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
