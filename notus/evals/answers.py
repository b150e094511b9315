"""Answers of a model to a benchmark's prompts, in the very files that the benchmark reads.

    python eval.py generate runs/notus-7b-v1/final --prompts mt_bench \\
        --out data/mt_bench/model_answer/notus.jsonl
    torchrun --nproc_per_node 8 eval.py generate ...         # the prompts are shared by the GPUs

While it runs, every finished batch is appended to OUT.partial-<rank>; the same command goes on from
there. At the end OUT is written in one piece, and beside it OUT's name with .settings.json.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from notus.agreement import agree
from notus.data.formats import Message
from notus.data.tokenizer import load_tokenizer
from notus.engine import distributed
from notus.engine.distributed import Ranks
from notus.errors import UserError
from notus.generate.decoding import (
    Backend,
    Request,
    import_vllm,
    transformers_backend,
    vllm_backend,
)
from notus.generate.prompts import (
    HUB_FILES,
    PROMPT_FORMATS,
    Prompt,
    PromptSet,
    check_template,
    encode_prompt,
    encode_published,
    read_prompt_set,
)
from notus.model.hf_config import ModelShape
from notus.model.weights import hash_weights, open_model

Result = TypeVar("Result")
Encode = Callable[[str | list[Message]], list[int]]
Decode = Callable[[list[int]], str]

# Of FastChat's gen_model_answer; a category that is not here has OTHER_TEMPERATURE.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7  # also that of Zephyr's and Notus's AlpacaEval answers
MAX_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "prompts": 1024}
# What transformers' generate takes where nothing is said, so also the published answers' value.
TOP_K = 50
BATCH_SIZES = {"transformers": 32, "vllm": 256}


class Answered(NamedTuple):
    """One prompt's responses, one for each turn, and when they were done, in Unix seconds."""

    responses: list[str]
    time: float


# ------------------------------------------------------------------------------------- answering


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

    device: where `write` draws. A prompt's turns share one stream of draws, begun at its seed.
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
    """From token ids to text without special tokens; without white space around it if `strip`."""

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip() if strip else text

    return decode


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, the longest prompts first.

    Then a batch is padded little, and memory runs out in the first batch or never.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [longest_first[start : start + size] for start in range(0, len(lengths), size)]


def respond_all(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    system_prompt: str | None,
    batch_size: int,
    dtype: str,
    strip: bool,
    device: torch.device,
) -> list[list[str]]:
    """The responses of the model in `folder`, each turn's, to each prompt.

    The ranks of a process group, if there is one, share the prompts; then it is collective.
    """

    def respond(numbered: Sequence[tuple[int, Prompt]]) -> list[list[str]]:
        if not numbered:
            return []
        tokenizer = load_tokenizer(folder)
        encode = partial(encode_prompt, tokenizer=tokenizer, system_prompt=system_prompt)
        write = transformers_backend(
            folder,
            tokenizer,
            device=device,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
        )
        responses: list[list[str]] = []
        for start in range(0, len(numbered), batch_size):
            numbers, batch = zip(*numbered[start : start + batch_size], strict=True)
            responses += answer(
                batch,
                [temperature] * len(batch),
                [seed + number for number in numbers],
                write,
                encode,
                decoder(tokenizer, strip),
                device,
            )
        return responses

    numbered = list(enumerate(prompts))
    if not dist.is_initialized():
        return respond(numbered)
    return [responses for part in distributed.divide(numbered, respond) for responses in part]


# --------------------------------------------------------------------------------- interruption


def read_partial(path: Path, settings: dict[str, Any]) -> dict[int, Answered]:
    """What an interrupted run has left in `path`, by the prompt's index.

    The first line holds the run's settings; a last line without an end was torn when the run was
    killed and does not count. Raises UserError when the file was written with other settings.
    """
    whole = path.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    if not lines:
        return {}
    try:
        found, *rows = [json.loads(line) for line in lines]
        answered = {row["index"]: Answered(row["responses"], row["time"]) for row in rows}
        different = [key for key in settings if found[key] != settings[key]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not what an interrupted run leaves ({error!r}); remove it to begin anew"
        ) from None
    for key in different:
        raise UserError(
            f"{path}: was begun with {key} {json.dumps(found[key])}, now it is "
            f"{json.dumps(settings[key])}; give the same again to go on, another --out, or "
            "remove the file to begin anew"
        )
    return answered


def begin_partial(path: Path, settings: dict[str, Any]) -> None:
    """Make `path` ready to be appended to: with its settings, and without a torn last line."""
    whole = path.read_bytes() if path.exists() else b""
    end = whole.rfind(b"\n") + 1
    if end:
        os.truncate(path, end)
    else:
        path.write_text(json.dumps(settings) + "\n")


def append_partial(path: Path, answered: dict[int, Answered]) -> None:
    """Add prompts that are now answered, in one write that has reached the disk on return."""
    lines = [
        json.dumps({"index": index, "responses": done.responses, "time": done.time}) + "\n"
        for index, done in answered.items()
    ]
    with path.open("a") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def partial_files(out: Path) -> list[Path]:
    """What all ranks of earlier runs have left for `out`."""
    return sorted(out.parent.glob(f"{out.name}.partial-*"))


def answered_so_far(out: Path, settings: dict[str, Any]) -> dict[int, Answered]:
    """What all partial files of `out` hold."""
    answered: dict[int, Answered] = {}
    for path in partial_files(out):
        answered |= read_partial(path, settings)
    return answered


def answer_share(
    path: Path,
    share: Sequence[list[int]],
    done: Collection[int],
    respond: Callable[[list[int]], list[list[str]]],
    bar: tqdm,
) -> None:
    """Append the responses to a rank's batches of prompts to `path`, without those in `done`.

    respond: from indices of prompts to their responses.
    """
    for batch in share:
        left = [index for index in batch if index not in done]
        if left:
            now = [Answered(responses, time.time()) for responses in respond(left)]
            append_partial(path, dict(zip(left, now, strict=True)))
            bar.update(len(left))


def progress(ranks: Ranks, share: Sequence[list[int]], done: Collection[int]) -> tqdm:
    """A bar over the prompts of this rank's share, with the time that is left; one rank shows it.

    The ranks' shares are alike, so one stands for all.
    """
    return tqdm(
        total=sum(map(len, share)),
        initial=sum(index in done for batch in share for index in batch),
        unit="prompt",
        desc=f"rank 0 of {ranks.count}" if ranks.count > 1 else None,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        disable=not ranks.first,
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that under its name there is all of it or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -------------------------------------------------------------------------------- output formats


def alpaca_eval_text(prompts: Sequence[Prompt], answers: Sequence[Answered], name: str) -> str:
    """AlpacaEval's model_outputs.json: a list of objects, `name` the leaderboard's generator."""
    rows = []
    for prompt, answered in zip(prompts, answers, strict=True):
        origin = {"dataset": prompt.row["dataset"]} if "dataset" in prompt.row else {}
        rows.append(
            origin
            | {
                "instruction": prompt.row["instruction"],
                "output": answered.responses[0],
                "generator": name,
            }
        )
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def mt_bench_text(prompts: Sequence[Prompt], answers: Sequence[Answered], name: str) -> str:
    """FastChat's model_answer file: a line for each question, in the order of their ids."""
    rows = [
        {
            "question_id": prompt.row["question_id"],
            "answer_id": secrets.token_urlsafe(16),  # 22 characters, as FastChat's short ids
            "model_id": name,
            "choices": [{"index": 0, "turns": answered.responses}],
            "tstamp": answered.time,
        }
        for prompt, answered in zip(prompts, answers, strict=True)
    ]
    return _json_lines(sorted(rows, key=lambda row: row["question_id"]))


def prompts_text(prompts: Sequence[Prompt], answers: Sequence[Answered], name: str) -> str:
    """JSON lines: each prompt's row as it was, with "response" and "generator"."""
    return _json_lines(
        [
            prompt.row | {"response": answered.responses[0], "generator": name}
            for prompt, answered in zip(prompts, answers, strict=True)
        ]
    )


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Form(NamedTuple):
    """How a kind of prompts is written out: the file name's ending, and its text."""

    suffix: str
    text: Callable[[Sequence[Prompt], Sequence[Answered], str], str]


FORMS = {
    "alpaca_eval": Form(".json", alpaca_eval_text),
    "mt_bench": Form(".jsonl", mt_bench_text),
    "prompts": Form(".jsonl", prompts_text),
}


def temperature_of(prompt: Prompt, kind: str, override: float | None) -> float:
    """The override, or else the benchmark's own."""
    if override is not None:
        return override
    if kind == "mt_bench":
        return MT_BENCH_TEMPERATURES.get(prompt.row["category"], OTHER_TEMPERATURE)
    return OTHER_TEMPERATURE


def seed_of(index: int, kind: str, seed: int) -> int:
    """A prompt's own seed. FastChat begins every question of a choice at the same one."""
    return seed if kind == "mt_bench" else seed + index


# --------------------------------------------------------------------------------- command line


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `generate` to the command line."""
    parser = commands.add_parser(
        "generate",
        help="answer a benchmark's prompts in the file that the benchmark reads",
        description="Answer prompts with a model. The answers to alpaca_eval are written as "
        "AlpacaEval's model_outputs.json, those to mt_bench as FastChat's model_answer/<id>.jsonl "
        "(both turns), those to a file with prompts as JSON lines. An interrupted run goes on when "
        "the same command is given again; under torchrun the GPUs share the prompts.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or hub id")
    parser.add_argument(
        "--prompts",
        required=True,
        help=f"{', '.join(HUB_FILES)} (from the hub), or a file with prompts: theirs, or JSON "
        'lines {"prompt": text or messages}',
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=".json for alpaca_eval, else .jsonl; of MT-Bench the file's name is the model's",
    )
    parser.add_argument(
        "--name",
        help="the model's name in the file (default: for mt_bench the file's name, else the "
        "model folder's)",
    )
    parser.add_argument(
        "--prompt-format",
        choices=PROMPT_FORMATS,
        default="template",
        help="template: as the model was trained, by its own chat template (default). published: "
        "the text of Zephyr's and Notus's published answers: an empty system turn and a BOS, for "
        "alpaca_eval without the last newline and with the answers not stripped",
    )
    parser.add_argument(
        "--system-prompt", help='begin conversations with it; "" is the empty turn of Zephyr'
    )
    parser.add_argument("--backend", choices=tuple(BATCH_SIZES), default="transformers")
    add_decoding_options(parser, max_new_tokens=None, temperature=None)
    parser.add_argument(
        "--tensor-parallel", type=positive_number, default=1, help="GPUs, vLLM only"
    )
    parser.set_defaults(run=run_generate)


def add_decoding_options(
    parser: argparse.ArgumentParser, *, max_new_tokens: int | None, temperature: float | None
) -> None:
    """Add the options that say how answers are decoded; None: what the benchmark wants."""
    own = "what the benchmark wants"
    parser.add_argument(
        "--max-new-tokens",
        type=positive_number,
        default=max_new_tokens,
        help=f"(default: {max_new_tokens or own})",
    )
    parser.add_argument(
        "--temperature",
        type=non_negative,
        default=temperature,
        help=f"0: the likeliest token each time (default: {own if temperature is None else 0})",
    )
    parser.add_argument(
        "--top-k",
        type=natural_number,
        default=TOP_K,
        help="sample from that many tokens, 0: from all (default: %(default)s)",
    )
    parser.add_argument("--seed", type=natural_number, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=positive_number,
        help="prompts at a time (default: "
        + ", ".join(f"{size} with {backend}" for backend, size in BATCH_SIZES.items())
        + ")",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="auto: as the weights are stored (default)",
    )


def natural_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}; expected at least 0")
    return number


def positive_number(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected at least 1")
    return number


def non_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}; expected a number of at least 0")
    return number


def run_generate(options: argparse.Namespace) -> int:
    """Carry out `generate`."""
    if options.backend == "vllm":
        import_vllm()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "--backend vllm: started by torchrun with several processes; expected one, vLLM "
                "starts its own for --tensor-parallel"
            )
        generate(options, Ranks(0, 1, torch.device("cpu")))
        return 0
    if options.tensor_parallel > 1:
        raise UserError(
            "--tensor-parallel: does nothing with --backend transformers; leave it out, or start "
            "one process for each GPU with torchrun, which share the prompts"
        )
    try:
        generate(options, distributed.start())
    finally:
        distributed.stop()
    return 0


def generate(options: argparse.Namespace, ranks: Ranks) -> None:
    """Answer all prompts, this rank its share, and write the file. Collective."""
    folder, tokenizer, prompt_set, name = _together(ranks, lambda: _open(options))
    prompts, kind = prompt_set.prompts, prompt_set.kind
    encode, decode = prompt_format(options, tokenizer, kind)
    encoded = _together(ranks, lambda: [encode(prompt.prompt) for prompt in prompts])
    settings = {
        "model_sha256": hash_weights(options.model, folder)["sha256"],
        "name": name,
        "prompts": prompt_set.source,
        "prompt_format": options.prompt_format,
        "system_prompt": options.system_prompt,
        "backend": options.backend,
        "dtype": options.dtype,
        "max_new_tokens": options.max_new_tokens or MAX_NEW_TOKENS[kind],
        "temperature": options.temperature,
        "top_k": options.top_k,
        "seed": options.seed,
        "prompt_tokens_sha256": hashlib.sha256(json.dumps(encoded).encode()).hexdigest(),
    }
    own_settings = {
        "dtype": options.dtype,
        "max_new_tokens": settings["max_new_tokens"],
        "top_k": options.top_k,
    }
    if options.backend == "vllm":
        open_backend = partial(vllm_backend, tensor_parallel=options.tensor_parallel)
    else:
        open_backend = partial(transformers_backend, device=ranks.device)
    write = open_backend(folder, tokenizer, **own_settings)

    def respond(indices: list[int]) -> list[list[str]]:
        return answer(
            [prompts[i] for i in indices],
            [temperature_of(prompts[i], kind, options.temperature) for i in indices],
            [seed_of(i, kind, options.seed) for i in indices],
            write,
            encode,
            decode,
            ranks.device,
        )

    size = options.batch_size or BATCH_SIZES[options.backend]
    share = batches([len(ids) for ids in encoded], size)[ranks.rank :: ranks.count]
    # All have read what there is before anyone writes.
    done = _together(ranks, lambda: answered_so_far(options.out, settings))
    path = options.out.with_name(f"{options.out.name}.partial-{ranks.rank}")
    begin_partial(path, settings)
    with progress(ranks, share, done) as bar:
        _together(ranks, lambda: answer_share(path, share, done, respond, bar))
    if ranks.first:
        answered = answered_so_far(options.out, settings)
        answers = [answered[index] for index in range(len(prompts))]
        record = {"model": options.model} | settings
        record["seeds"] = [seed_of(index, kind, options.seed) for index in range(len(prompts))]
        record["versions"] = _versions(options.backend)
        write_whole(settings_file(options.out), json.dumps(record) + "\n")
        write_whole(options.out, FORMS[kind].text(prompts, answers, name))
        for path in partial_files(options.out):
            path.unlink()
    ranks.say(f"wrote {len(prompts)} answers of {name} to {options.out}")


def _together(ranks: Ranks, function: Callable[[], Result]) -> Result:
    """Call `function`; a UserError on any rank is raised on all of them."""
    return agree(function) if dist.is_initialized() else function()


def settings_file(out: Path) -> Path:
    """Where the settings and seeds that `out` was generated with are recorded."""
    return out.with_name(f"{out.name}.settings.json")


def _versions(backend: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", backend)}


def _open(
    options: argparse.Namespace,
) -> tuple[Path, PreTrainedTokenizerFast, PromptSet, str]:
    """Check all that can be checked before a model is loaded.

    Returns the model's folder, its tokenizer, the prompts, and the model's name in the file.
    """
    prompt_set = read_prompt_set(options.prompts)
    name = check_out(options.out, prompt_set.kind, options.name, options.model)
    if options.prompt_format == "published":
        if options.system_prompt is not None:
            raise UserError(
                "--system-prompt: the published format has an empty system turn; leave it out, or "
                "give --prompt-format template"
            )
        if any(isinstance(prompt.prompt, str) for prompt in prompt_set.prompts):
            raise UserError(
                f"{options.prompts}: found plain text, expected conversations for "
                "--prompt-format published"
            )
    folder, tokenizer, _ = open_answerer(options.model)
    if options.prompt_format == "template":
        check_template(prompt_set.prompts, options.prompts, folder, tokenizer)
    return folder, tokenizer, prompt_set, name


def open_answerer(model: str) -> tuple[Path, PreTrainedTokenizerFast, ModelShape]:
    """The folder, tokenizer and shape of a model that is all there and fits its tokenizer."""
    folder, shape = open_model(model)
    return folder, load_tokenizer(folder, shape.vocab_size), shape


def check_out(out: Path, kind: str, name: str | None, model: str) -> str:
    """The model's name in the file, once `out` is known to be free and of the right form."""
    suffix = FORMS[kind].suffix
    if out.suffix != suffix:
        raise UserError(f"--out {out}: for prompts of the kind {kind}, expected a {suffix} file")
    if out.exists():
        raise UserError(f"--out {out}: the file exists; remove it or give another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if kind == "mt_bench":
        if name not in (None, out.stem):
            raise UserError(
                f"--name {name}: FastChat takes the model's name from the file's, {out.stem}; "
                "expected the same, or no --name"
            )
        return out.stem
    return name or default_name(model)


def default_name(model: str) -> str:
    """The folder's own name; of a run's `final` that of the run."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    return path.parent.name if path.name == "final" else path.name


def prompt_format(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, kind: str
) -> tuple[Encode, Decode]:
    """How prompts become tokens, and tokens answers."""
    if options.prompt_format == "published":
        encode = partial(
            encode_published,
            tokenizer=tokenizer,
            system_prompt=None,
            final_newline=kind != "alpaca_eval",
        )
        return encode, decoder(tokenizer, strip=kind != "alpaca_eval")
    encode = partial(encode_prompt, tokenizer=tokenizer, system_prompt=options.system_prompt)
    return encode, decoder(tokenizer, strip=True)
