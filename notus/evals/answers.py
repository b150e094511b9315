"""Answers of a model to a benchmark's prompts, in the very files that the benchmark reads.

    python eval.py generate runs/notus-7b-v1/final --prompts mt_bench \\
        --out data/mt_bench/model_answer/notus.jsonl
    torchrun --nproc_per_node 8 eval.py generate ...           # the GPUs share the prompts

While it runs, every finished batch is a file in the folder OUT.partial; the same command, given
again, answers only the other prompts. OUT is written at the end, with its settings next to it in
OUT.settings.json.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from notus.engine import distributed
from notus.engine.distributed import Ranks
from notus.errors import UserError, agreed
from notus.evals.benchmarks import (
    FORMS,
    MAX_NEW_TOKENS,
    TOP_K,
    Answered,
    seed_of,
    temperature_of,
)
from notus.files import new_folder, read_object, write_json, write_whole
from notus.generate.answering import Decode, Encode, answer, decoder, open_answerer
from notus.generate.decoding import import_vllm, transformers_backend, vllm_backend
from notus.generate.prompts import (
    HUB_FILES,
    PROMPT_FORMATS,
    PromptSet,
    check_template,
    encode_prompt,
    encode_published,
    read_prompt_set,
)
from notus.model.weights import hash_weights

BATCH_SIZES = {"transformers": 32, "vllm": 256}
PROMPT_ROWS = '{"prompt": text or messages}'
PROMPT_FORMATS_HELP = (
    "template: the model's own chat template, as in training (default). published: the text behind "
    "Zephyr's and Notus's published answers: an empty system turn and a BOS; for alpaca_eval "
    "without the last newline, and answers are not stripped"
)


def generate(options: argparse.Namespace, ranks: Ranks) -> None:
    """Answer this rank's share of the prompts, and write the file. Collective."""
    with together():
        folder, tokenizer, prompt_set, name = check_options(options)
        prompts, kind = prompt_set.prompts, prompt_set.kind
        encode, decode = prompt_format(options, tokenizer, kind)
        encoded = [encode(prompt.prompt) for prompt in prompts]
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
    decoding = {key: settings[key] for key in ("dtype", "max_new_tokens", "top_k")}
    if options.backend == "vllm":
        write = vllm_backend(folder, tokenizer, tensor_parallel=options.tensor_parallel, **decoding)
    else:
        write = transformers_backend(folder, tokenizer, device=ranks.device, **decoding)
    seeds = [seed_of(index, kind, options.seed) for index in range(len(prompts))]

    def respond(indices: Sequence[int]) -> list[list[str]]:
        return answer(
            [prompts[i] for i in indices],
            [temperature_of(prompts[i], kind, options.temperature) for i in indices],
            [seeds[i] for i in indices],
            write,
            encode,
            decode,
            ranks.device,
        )

    partial_folder = options.out.with_name(f"{options.out.name}.partial")
    with together():
        done = answered_so_far(partial_folder, settings)
    with together():  # every rank has read the folder before any rank writes
        if ranks.first and not partial_folder.is_dir():
            with new_folder(partial_folder) as new:
                write_json(new / "settings.json", settings)
    size = options.batch_size or BATCH_SIZES[options.backend]
    left = [
        [index for index in batch if index not in done]
        for batch in batches([len(ids) for ids in encoded], size)[ranks.rank :: ranks.count]
    ]
    with together(), progress(ranks, sum(map(len, left))) as bar:
        for indices in filter(None, left):
            answer_batch(partial_folder, indices, respond)
            bar.update(len(indices))
    if ranks.first:
        answered = answered_so_far(partial_folder, settings)
        answers = [answered[index] for index in range(len(prompts))]
        versions = {name: importlib.metadata.version(name) for name in ("torch", options.backend)}
        record = {"model": options.model} | settings | {"seeds": seeds, "versions": versions}
        settings_file = options.out.with_name(f"{options.out.name}.settings.json")
        write_whole(settings_file, json.dumps(record) + "\n", durable=True)
        write_whole(options.out, FORMS[kind].text(prompts, answers, name), durable=True)
        shutil.rmtree(partial_folder)
    ranks.say(f"wrote {len(prompts)} answers of {name} to {options.out}")


def together() -> AbstractContextManager[None]:
    """`agreed` where there is a process group; vLLM runs without one."""
    return agreed() if dist.is_initialized() else nullcontext()


def prompt_format(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, kind: str
) -> tuple[Encode, Decode]:
    """The functions from a prompt to token ids, and from an answer's token ids to text."""
    if options.prompt_format == "published":
        whole = kind != "alpaca_eval"
        encode = partial(encode_published, tokenizer=tokenizer, final_newline=whole)
        return encode, decoder(tokenizer, strip=whole)
    encode = partial(encode_prompt, tokenizer=tokenizer, system_prompt=options.system_prompt)
    return encode, decoder(tokenizer, strip=True)


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, the longest prompts first.

    So batches need little padding, and memory runs out in the first batch or never.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [longest_first[start : start + size] for start in range(0, len(lengths), size)]


def answered_so_far(folder: Path, settings: dict[str, Any]) -> dict[int, Answered]:
    """The answers of an interrupted run by the prompt's index.

    Raises UserError if the run had other settings.
    """
    if not folder.is_dir():
        return {}
    found = read_object(folder / "settings.json")
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder}: was started with {key} {json.dumps(found.get(key))}, now it is "
                f"{json.dumps(value)}; give the same to resume, another --out, or remove the "
                "folder to start over"
            )
    return {
        int(index): Answered(*row)
        for file in folder.glob("batch-*.json")
        for index, row in read_object(file).items()
    }


def answer_batch(
    folder: Path, indices: Sequence[int], respond: Callable[[Sequence[int]], list[list[str]]]
) -> None:
    """Answer prompts and keep their responses in a file, which is on the disk on return.

    respond: from indices of prompts to their responses.
    """
    responses = respond(indices)
    now = time.time()
    answered = {i: Answered(texts, now) for i, texts in zip(indices, responses, strict=True)}
    write_json(folder / f"batch-{indices[0]}.json", answered, durable=True)


def progress(ranks: Ranks, total: int) -> tqdm:
    """A bar over this rank's prompts, shown by one rank; the ranks' shares are about equal."""
    return tqdm(
        total=total,
        unit="prompt",
        desc=f"rank 0 of {ranks.count}" if ranks.count > 1 else None,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        disable=not ranks.first,
    )


# --------------------------------------------------------------------------------- command line


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `generate` to the command line."""
    parser = commands.add_parser(
        "generate",
        help="answer a benchmark's prompts in the file that the benchmark reads",
        description="Answer prompts with a model. The answers to alpaca_eval are written as "
        "AlpacaEval's model_outputs.json, those to mt_bench as FastChat's model_answer/<id>.jsonl "
        "(both turns), those to a file with prompts as JSON lines. An interrupted run resumes when "
        "the same command is given again; under torchrun the GPUs share the prompts.",
    )
    own = ", ".join(HUB_FILES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a Hugging Face folder or hub id")
    add("--prompts", required=True, help=f"{own}, or a file: theirs, or rows {PROMPT_ROWS}")
    add("--out", required=True, type=Path, help=".json for alpaca_eval, else .jsonl")
    add("--name", help="the model's, in the file (default: for mt_bench the file's, else MODEL's)")
    add("--prompt-format", choices=PROMPT_FORMATS, default="template", help=PROMPT_FORMATS_HELP)
    add("--system-prompt", help='a system turn for conversations without one; "": an empty one')
    add("--backend", choices=tuple(BATCH_SIZES), default="transformers")
    add_decoding_options(parser)
    add("--tensor-parallel", type=at_least(1), default=1, help="GPUs, vLLM only")
    parser.set_defaults(run=run_generate)


def add_decoding_options(
    parser: argparse.ArgumentParser,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> None:
    """Add the options for decoding; a default of None stands for the benchmark's own."""
    sizes = ", ".join(f"{size} with {backend}" for backend, size in BATCH_SIZES.items())
    dtypes = ("auto", "bfloat16", "float32")
    default = "(default: %(default)s; None: the benchmark's own)"
    add = parser.add_argument
    add("--max-new-tokens", type=at_least(1), default=max_new_tokens, help=default)
    add("--temperature", type=at_least(0, float), default=temperature, help=f"0: greedy {default}")
    add("--top-k", type=at_least(0), default=TOP_K, help="0: from all (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="(default: %(default)s)")
    add("--batch-size", type=at_least(1), help=f"prompts at a time (default: {sizes})")
    add(
        "--dtype", choices=dtypes, default="auto", help="auto: that of the stored weights (default)"
    )


def at_least(minimum: int, kind: type = int) -> Callable[[str], Any]:
    """A converter for argparse: finite numbers of a type, from `minimum` on."""

    def number(text: str) -> Any:
        if not minimum <= kind(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}; expected a number of at least {minimum}")
        return kind(text)

    return number


def run_generate(options: argparse.Namespace) -> None:
    if options.backend == "vllm":
        import_vllm()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "--backend vllm: started by torchrun with several processes; expected one, because "
                "vLLM starts its own for --tensor-parallel"
            )
        generate(options, Ranks(0, 1, torch.device("cpu")))
        return
    if options.tensor_parallel > 1:
        raise UserError(
            "--tensor-parallel: does nothing with --backend transformers; leave it out, or start "
            "one process per GPU with torchrun, and they share the prompts"
        )
    try:
        generate(options, distributed.start())
    finally:
        distributed.stop()


def check_options(
    options: argparse.Namespace,
) -> tuple[Path, PreTrainedTokenizerFast, PromptSet, str]:
    """The model's folder, its tokenizer, the prompts, and the model's name in the file.

    Raises UserError for everything that can be wrong before a model is loaded.
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


def check_out(out: Path, kind: str, name: str | None, model: str) -> str:
    """The model's name in the file. Raises UserError unless `out` is free and of the right form."""
    suffix = FORMS[kind].suffix
    if out.suffix != suffix:
        raise UserError(f"--out {out}: for prompts of the kind {kind}, expected a {suffix} file")
    check_free(out)
    if kind == "mt_bench":
        if name not in (None, out.stem):
            raise UserError(
                f"--name {name}: FastChat takes the model's name from the file's, {out.stem}; "
                "expected the same, or no --name"
            )
        return out.stem
    return name or default_name(model)


def check_free(out: Path) -> None:
    """Raise UserError if --out exists already, or its folder does not."""
    if out.exists():
        raise UserError(f"--out {out}: the file exists; remove it or give another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")


def default_name(model: str) -> str:
    """The model folder's name, or that of the run for a run's `final`."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    return path.parent.name if path.name == "final" else path.name
