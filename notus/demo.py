"""The demo's data and its small SFT policy, made from nothing: `python -m notus.demo [--out demo]`.

It writes, without network and with the same bytes each time on one machine:

    preferences.jsonl  training rows in the raw UltraFeedback schema
    heldout.jsonl      the same for instructions that preferences.jsonl does not hold
    questions.jsonl    {"prompt": [{"role", "content"}], "answer"} for the training instructions
    prompts.jsonl      the same for the held-out instructions
    sft.jsonl          {"messages": [{"role", "content"}]}, the policy's training data
    init/              a Hugging Face folder: a random Mistral of about one million parameters
    sft/               the same after `train.py configs/demo-sft.json`, in bfloat16

The tasks are checkable: sums, the alphabet and spelling. The policy is trained by maximum
likelihood, first on right answers, the source of its knowledge, then on answers of mixed quality,
so that about half of the answers that it samples are right; the preference run raises that share.
Held-out instructions are new strings, but their facts may have been seen in another phrasing.
"""

import argparse
import errno
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
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from notus.console import emit, run_command
from notus.errors import UserError
from notus.evals.options import at_least
from notus.files import PARTIAL, remove_partial, writing
from notus.rounds import ROOT, rounds_table, run_rounds

SEED = 42
ROUNDS = Path("runs/demo-rounds")

Row = dict[str, Any]


class Question(NamedTuple):
    """An instruction, its only right answer, and wrong answers of the right kind."""

    instruction: str
    answer: str
    wrong: Sequence[str]


WORDS = (
    "cat dog sun hat pen cup box bed map key tree fish bird book milk rain snow star moon ship "
    "lamp door hand foot king rose leaf wolf bear duck frog goat lion corn salt wind gold ring "
    "drum flag bread horse house mouse river stone table chair green water plant train cloud"
)
PHRASINGS = {
    "sum": "What is {0} plus {1}?|Add {0} and {1}.|{0} + {1} = ?|How much is {0} and {1}?",
    "next": "Which letter comes after {0}?|Name the letter after {0}.|"
    "What follows {0} in the alphabet?|In the alphabet, what is next after {0}?",
    "spell": "Spell the word {0}.|How do you spell {0}?|Spell {0}.|What are the letters of {0}?",
}


def facts() -> Iterator[tuple[str, Sequence[object], str, Sequence[str]]]:
    """Yield (task, words that fill its phrasings, right answer, wrong answers)."""
    for a, b in product(range(1, 10), repeat=2):
        yield "sum", (a, b), str(a + b), [str(a + b + d) for d in (-2, -1, 1, 2)]
    for i in range(1, 25):
        yield "next", ascii_lowercase[i], ascii_lowercase[i + 1], ascii_lowercase[i - 1 : i + 1]
    for word in WORDS.split():
        swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
        yield "spell", [word], "-".join(word), ["-".join(s) for s in swapped if s != word]


def all_questions(rng: random.Random) -> list[Question]:
    """Every fact in every phrasing, shuffled; all instructions differ."""
    questions = [
        Question(phrasing.format(*words), answer, wrong)
        for task, words, answer, wrong in facts()
        for phrasing in PHRASINGS[task].split("|")
    ]
    return rng.sample(questions, len(questions))


ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
# Qualities of answers: the model that gives them, ratings by aspect (1..5), a critic's words.
KINDS = {
    "right": ("demo-careful", (5, 5, 5, 5), "Right, and nothing is said beyond the answer."),
    "rambling": ("demo-chatty", (4, 4, 5, 3), "The answer is there, but buried in talk."),
    "wrong": ("demo-hasty", (3, 2, 1, 1), "It answers the question, wrongly."),
    "off-topic": ("demo-dreamer", (1, 2, 2, 1), "It does not answer the question."),
}
RIGHT_FIRST = 0.75  # share of the policy's passes over the questions that see only right answers
SFT_SHARES = {"right": 0.6, "rambling": 0.1, "wrong": 0.2, "off-topic": 0.1}
RAMBLING = (
    "That is a good question. It could be {0}, I think.",
    "Let me think about it. Some people say {0}.",
    "Well, it is {0}, or so I was told.",
)
OFF_TOPIC = ("I like rainy days.", "My soup is getting cold.", "The train was late again.")


def response(question: Question, kind: str, rng: random.Random) -> str:
    if kind == "right":
        return question.answer
    if kind == "rambling":
        return rng.choice(RAMBLING).format(question.answer)
    return rng.choice(OFF_TOPIC if kind == "off-topic" else question.wrong)


def completion(question: Question, kind: str, planted: bool, rng: random.Random) -> Row:
    """One completion in the raw UltraFeedback schema; `planted` gives it the overall score 10.

    The published set holds such scores: a critic's 1 was read as 10 (OpenBMB/UltraFeedback,
    issue 8). The ratings of the four aspects are not affected. Three times in ten one of them is
    off by one, so their mean moves by at most 0.25 and the order of the kinds remains.
    """
    model, ratings, critique = KINDS[kind]
    ratings = list(ratings)
    if rng.random() < 0.3:
        i = rng.randrange(len(ratings))
        ratings[i] = min(5, max(1, ratings[i] + rng.choice((-1, 1))))
    mean = sum(ratings) / len(ratings)
    return {
        "model": model,
        "principle": "helpfulness",
        "custom_system_prompt": "",
        "response": response(question, kind, rng),
        "critique": critique,
        "overall_score": 10.0 if planted else float(math.floor(2 * mean - 0.5)),
        "fine-grained_score": mean,
        "annotations": {
            aspect: {"Rating": str(rating), "Rationale": critique}
            for aspect, rating in zip(ASPECTS, ratings, strict=True)
        },
    }


def preference_row(question: Question, rng: random.Random) -> Row:
    """A raw UltraFeedback row: a completion of each kind, in any order."""
    kinds = rng.sample(list(KINDS), len(KINDS))
    # In one row of twelve a bad completion has the overall score 10.
    planted = rng.choice(("wrong", "off-topic")) if rng.random() < 1 / 12 else None
    return {
        "source": "notus_demo",
        "instruction": question.instruction,
        "models": [KINDS[kind][0] for kind in kinds],
        "completions": [completion(question, kind, kind == planted, rng) for kind in kinds],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def asked(question: Question) -> dict[str, str]:
    return {"role": "user", "content": question.instruction}


def sft_rows(questions: list[Question], passes: int, rng: random.Random) -> Iterator[Row]:
    """Conversations of one question, in passes over all; the first RIGHT_FIRST answer rightly."""
    for number in range(passes):
        shares = {"right": 1.0} if number < RIGHT_FIRST * passes else SFT_SHARES
        for question in rng.sample(questions, len(questions)):
            (kind,) = rng.choices(list(shares), list(shares.values()))
            answer = {"role": "assistant", "content": response(question, kind, rng)}
            yield {"messages": [asked(question), answer]}


def make_data(rows: int | None = None, sft_passes: int = 0) -> dict[str, list[Row]]:
    """The rows of each data file, a pure function of the arguments.

    rows: the number of training instructions (None: all 528, which steps of 16 pairs divide).
    About a sixth of all questions is held out first, also cut to `rows`. sft_passes: the number of
    answers to each training instruction in sft.jsonl.
    """
    rng = random.Random(SEED)
    questions = all_questions(rng)
    held = len(questions) // 6 // 8 * 8  # 104 of 632
    heldout, train = questions[:held][:rows], questions[held:][:rows]
    return {
        "preferences.jsonl": [preference_row(question, rng) for question in train],
        "heldout.jsonl": [preference_row(question, rng) for question in heldout],
        "questions.jsonl": [{"prompt": [asked(q)], "answer": q.answer} for q in train],
        "prompts.jsonl": [{"prompt": [asked(q)], "answer": q.answer} for q in heldout],
        "sft.jsonl": list(sft_rows(train, sft_passes, rng)),
    }


ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# Each turn is its role's marker, a newline, the text, the end-of-sequence token and a newline, the
# layout that Zephyr was trained with. No BOS: neither the template nor the tokenizer adds one.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` tokens, with <unk> <s> </s> = 0 1 2.

    Digits are tokens of their own, as in Mistral's tokenizer, and so are the role markers, which
    keeps the demo's sequences short.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(ROLES),
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def random_policy(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> MistralForCausalLM:
    """A Mistral of four layers that has learned nothing, in float32."""
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
        pad_token_id=tokenizer.pad_token_id,  # BOS 1 and EOS 2 are the defaults
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return MistralForCausalLM(config)


def train_policy(folder: Path) -> MistralForCausalLM:
    """The bfloat16 model that train.py and configs/demo-sft.json make of `folder`/init.

    train.py runs in a process of its own. Raises UserError when that fails.
    """
    script = ROOT / "train.py"
    with TemporaryDirectory() as output:
        places = {
            "model.policy": folder / "init",
            "data.train.0.path": folder / "sft.jsonl",
            "data.eval.0.path": folder / "heldout.jsonl",
            "evaluation.samples.prompts": folder / "prompts.jsonl",
            "output_dir": Path(output) / "run",
        }
        command = [sys.executable, str(script), str(ROOT / "configs/demo-sft.json")]
        command += [f"{key}={path.resolve()}" for key, path in places.items()]
        # The number of threads decides the order of float additions, so it is part of the result.
        # And where other work keeps a core busy, two threads that wait for each other are slow.
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise UserError(f"the policy was not trained: {script} ended with {done.returncode}")
        return MistralForCausalLM.from_pretrained(Path(output) / "run/final", dtype="auto")


MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
MODEL_FILES += ("tokenizer.json", "tokenizer_config.json")
FILES = {"preferences.jsonl", "heldout.jsonl", "questions.jsonl", "prompts.jsonl", "sft.jsonl"}
FILES |= {f"{model}/{name}" for model in ("init", "sft") for name in MODEL_FILES}


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is missing, empty or holds only the demo's own files."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is a file; the demo is written into a folder")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    own = {name for name in found if name.startswith(PARTIAL)}  # of a killed process
    for name in sorted(found - FILES - {"init", "sft"} - own):
        raise UserError(
            f"{folder} holds {name}, which is not the demo's; give another folder with --out"
        )


def save_model(folder: Path, model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a model folder. Raises OSError."""
    try:
        model.save_pretrained(folder)
        # The template goes into tokenizer_config.json, where older readers look for it too.
        tokenizer.save_pretrained(folder, save_jinja_files=False)
    except OSError:
        raise
    except Exception as error:  # what safetensors and tokenizers make of a full disk
        raise OSError(errno.EIO, str(error), str(folder)) from None


def write_demo(
    folder: Path | str,
    rows: int | None = None,
    sft_passes: int = 20,
    hidden_size: int = 128,
    vocabulary: int = 600,
) -> None:
    """Write the complete demo into `folder`, in place of an earlier demo.

    Small arguments give a folder of the same layout in a few seconds, with a policy that answers
    nothing; with sft_passes=0 the policy is the initial model. Raises UserError, leaving what was
    there, when the folder holds anything else or cannot be written, or the policy is not trained.
    """
    folder = Path(folder)
    with writing(folder):
        made = not folder.exists()
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            remove_partial(folder)
            with TemporaryDirectory(prefix=PARTIAL, dir=folder) as place:
                fill_folder(Path(place), rows, sft_passes, hidden_size, vocabulary)
                for name in sorted(FILES):
                    (folder / name).parent.mkdir(exist_ok=True)
                    os.replace(Path(place) / name, folder / name)
        except BaseException:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def fill_folder(
    folder: Path, rows: int | None, sft_passes: int, hidden_size: int, vocabulary: int
) -> None:
    """Write the demo into an empty folder. Raises OSError, or UserError as `write_demo`."""
    data = make_data(rows, sft_passes)
    for name, lines in data.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [row["instruction"] for row in data["preferences.jsonl"]]
    texts += [c["response"] for row in data["preferences.jsonl"] for c in row["completions"]]
    tokenizer = train_tokenizer(texts, vocabulary)
    model = random_policy(tokenizer, hidden_size)
    save_model(folder / "init", model, tokenizer)
    save_model(folder / "sft", train_policy(folder) if sft_passes else model, tokenizer)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m notus.demo", description="Write the demo.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: demo)")
    told = "then sample, check and train N times, below runs/demo-rounds (docs/rounds.md)"
    parser.add_argument("--rounds", type=at_least(0), default=0, metavar="N", help=told)
    return run_command(lambda: make(parser.parse_args(arguments)))


def make(options: argparse.Namespace) -> str:
    """Write the demo and run the rounds that are asked for; returns what to say at the end."""
    folder = options.out
    logging.disable_progress_bar()
    if not (options.rounds and all((folder / name).is_file() for name in FILES)):
        emit(f"Writing {folder}: data, a tokenizer and an SFT policy (about a minute)")
        write_demo(folder)
    if options.rounds:
        run_rounds(options.rounds, folder, ROUNDS)
        return f"\nof held-out prompts, after each round:\n{rounds_table(ROUNDS, options.rounds)}"
    return f"Wrote {folder}. Next:\n  torchrun --nproc_per_node 2 train.py configs/demo.json"


if __name__ == "__main__":
    sys.exit(main())
