"""Answers of a model to a benchmark's prompts, in the very files that the benchmark reads.

    python eval.py generate runs/notus-7b-v1/final --prompts mt_bench \\
        --out data/mt_bench/model_answer/notus.jsonl
    torchrun --nproc_per_node 8 eval.py generate ...           # the GPUs share the prompts
    python eval.py generate MODEL --prompts FILE --samples 5 --out responses.jsonl

With --samples every prompt of a prompt or preference file is answered several times, for a judge.

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
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from notus.console import counted, emit
from notus.engine import distributed
from notus.engine.distributed import Ranks
from notus.engine.log import progress
from notus.errors import UserError, agreed
from notus.evals import benchmarks
from notus.evals.benchmarks import Answered
from notus.evals.options import BATCH_SIZES, NewPath, add_decoding_options, at_least, model_path
from notus.files import new_folder, read_object, write_json, write_whole
from notus.generate.answering import answer, decoder, open_answerer
from notus.generate.decoding import import_vllm, transformers_backend, vllm_backend
from notus.generate.prompts import (
    HUB_FILES,
    PROMPT_ROWS,
    Prompt,
    check_template,
    encode_prompt,
    encode_published,
    read_prompt_set,
    read_questions,
)
from notus.model.weights import hash_weights

PROMPT_FORMATS_HELP = (
    "template: the model's own chat template, as in training (default). published: the text behind "
    "Zephyr's and Notus's published answers: an empty system turn and a BOS; for alpaca_eval "
    "without the last newline, and answers are not stripped"
)


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a benchmark's prompts in the file that the benchmark reads",
        description="Answer prompts with a model. The answers to alpaca_eval are written as "
        "AlpacaEval's model_outputs.json, those to mt_bench as FastChat's model_answer/<id>.jsonl "
        "(both turns), those to a file with prompts as JSON lines. With --samples, each prompt of "
        "any prompt or preference file is answered several times. An interrupted run resumes when "
        "the same command is given again; under torchrun the GPUs share the prompts.",
    )
    own, formats = ", ".join(HUB_FILES), ("template", "published")
    suffixes = ".json for alpaca_eval, else .jsonl"
    add = parser.add_argument
    about = "a Hugging Face folder, a run's output_dir, or a hub id"
    add("model", metavar="MODEL", type=model_path, help=about)
    add("--prompts", required=True, help=f"{own}, or a file: theirs, or rows {PROMPT_ROWS}")
    add("--out", required=True, type=Path, action=NewPath, help=suffixes)
    several = "draws for each prompt; --prompts may then be preferences of any format too"
    add("--samples", type=at_least(1), metavar="K", help=several)
    add("--name", help="the model's, in the file (default: for mt_bench the file's, else MODEL's)")
    add("--prompt-format", choices=formats, default="template", help=PROMPT_FORMATS_HELP)
    add("--system-prompt", help='a system turn for conversations without one; "": an empty one')
    add("--backend", choices=tuple(BATCH_SIZES), default="transformers")
    add_decoding_options(parser)
    add("--tensor-parallel", type=at_least(1), default=1, help="GPUs, vLLM only")
    parser.set_defaults(run=generate)


def generate(options: argparse.Namespace) -> None:
    """Answer this rank's share of the prompts, and write the file. Collective."""
    ranks = start(options)
    with agreed():
        folder, tokenizer, prompts, kind = check_options(options)
        published = options.prompt_format == "published"
        bare = published and kind == "alpaca_eval"
        decode = decoder(tokenizer, strip=not bare)
        encode = partial(encode_prompt, tokenizer=tokenizer, system_prompt=options.system_prompt)
        if published:
            encode = partial(encode_published, tokenizer=tokenizer, final_newline=not bare)
        encoded = [encode(prompt.prompt) for prompt in prompts]
    options.max_new_tokens = options.max_new_tokens or benchmarks.MAX_NEW_TOKENS[kind]
    if options.name is None:
        options.name = options.out.stem if kind == "mt_bench" else default_name(options.model)
    keys = ("name", "prompts", "prompt_format", "system_prompt", "backend", "dtype")
    keys += ("samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {
        "model_sha256": hash_weights(options.model, folder)["sha256"],
        **{key: getattr(options, key) for key in keys},
        "prompt_tokens_sha256": hashlib.sha256(json.dumps(encoded).encode()).hexdigest(),
    }
    decoding = {key: settings[key] for key in ("dtype", "max_new_tokens", "top_k", "top_p")}
    if options.backend == "vllm":
        write = vllm_backend(folder, tokenizer, tensor_parallel=options.tensor_parallel, **decoding)
    else:
        write = transformers_backend(folder, tokenizer, device=ranks.device, **decoding)

    partial_folder = options.out.with_name(f"{options.out.name}.partial")
    with agreed():
        done = answered_so_far(partial_folder, settings)
    with agreed():  # every rank has read the folder before any rank writes
        if ranks.first and not partial_folder.is_dir():
            with new_folder(partial_folder) as new:
                write_json(new / "settings.json", settings)
    size = options.batch_size or BATCH_SIZES[options.backend]
    share = batches([len(ids) for ids in encoded], size)[ranks.rank :: ranks.count]
    left = [[index for index in batch if index not in done] for batch in share]
    temperatures = [benchmarks.temperature_of(p, kind, options.temperature) for p in prompts]
    if options.samples:
        draws = range(options.samples)
        once = prompts[:: options.samples]
        seeds = [benchmarks.draw_seed(p, draw, options.seed) for p in once for draw in draws]
    else:
        seeds = [benchmarks.seed_of(index, kind, options.seed) for index in range(len(prompts))]
    show = progress(sum(map(len, left)), 0, "prompt") if ranks.first else nullcontext()
    with agreed(), show as bar:
        for indices in filter(None, left):
            own = ([column[i] for i in indices] for column in (prompts, temperatures, seeds))
            responses = answer(*own, write, encode, decode, ranks.device)
            found = {i: Answered(r, time.time()) for i, r in zip(indices, responses, strict=True)}
            write_json(partial_folder / f"batch-{indices[0]}.json", found, durable=True)
            if bar:
                bar.update(len(indices))
    if not ranks.first:
        return
    answered = answered_so_far(partial_folder, settings)
    answers = [answered[index] for index in range(len(prompts))]
    versions = {name: importlib.metadata.version(name) for name in ("torch", options.backend)}
    record = {"model": options.model} | settings | {"seeds": seeds, "versions": versions}
    settings_file = options.out.with_name(f"{options.out.name}.settings.json")
    write_whole(settings_file, json.dumps(record) + "\n", durable=True)
    if options.samples:
        text = benchmarks.samples_text(prompts, answers, seeds, options.name)
    else:
        text = benchmarks.answers_text(kind, prompts, answers, options.name)
    write_whole(options.out, text, durable=True)
    shutil.rmtree(partial_folder)
    emit(f"wrote {counted(len(prompts), 'answers')} of {options.name} to {options.out}")


def start(options: argparse.Namespace) -> Ranks:
    """The ranks of this process group, or one rank without a group for vLLM, which starts its own.

    Raises UserError for options that the backend does not have.
    """
    if options.backend == "vllm":
        import_vllm()
        if options.device != "auto":
            raise UserError("--device: vLLM finds its own; leave it out")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "--backend vllm: started by torchrun with several processes; expected one, because "
                "vLLM starts its own for --tensor-parallel"
            )
        return Ranks(0, 1, torch.device("cpu"))
    if options.tensor_parallel > 1:
        raise UserError(
            "--tensor-parallel: does nothing with --backend transformers; leave it out, or start "
            "one process per GPU with torchrun, and they share the prompts"
        )
    return distributed.start(options.device)


def check_options(
    options: argparse.Namespace,
) -> tuple[Path, PreTrainedTokenizerFast, list[Prompt], str]:
    """The model's folder, its tokenizer, the prompts (each as often as it is asked), their kind.

    Raises UserError for everything that can be wrong before a model is loaded.
    """
    prompts, kind = (read_questions if options.samples else read_prompt_set)(options.prompts)
    out, name, suffix = options.out, options.name, benchmarks.SUFFIXES[kind]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: for the kind {kind}, expected a {suffix} file")
    if kind == "mt_bench" and name not in (None, out.stem):
        raise UserError(
            f"--name {name}: FastChat takes the model's name from the file's, {out.stem}; "
            "expected the same, or no --name"
        )
    folder, tokenizer = open_answerer(options.model)
    if options.prompt_format == "template":
        check_template(prompts, options.prompts, tokenizer)
    elif options.system_prompt is not None:
        raise UserError(
            "--system-prompt: the published format has an empty system turn; leave it out"
        )
    elif any(isinstance(prompt.prompt, str) for prompt in prompts):
        raise UserError(
            f"{options.prompts}: found text, expected conversations for the published format"
        )
    if (options.samples or 1) > 1 and options.temperature == 0:
        raise UserError(
            f"--temperature 0: all {options.samples} samples would be the same; expected above 0"
        )
    return folder, tokenizer, [p for p in prompts for _ in range(options.samples or 1)], kind


def default_name(model: str) -> str:
    """The model folder's name, or that of the run for a run's `final`."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    return path.parent.name if path.name == "final" else path.name


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
                f"{json.dumps(value)}; give the same or another --out, or remove the folder"
            )
    return {
        int(index): Answered(*row)
        for file in folder.glob("batch-*.json")
        for index, row in read_object(file).items()
    }
