"""Answers of a model and of its reference to the same prompts, as one Markdown page.

python eval.py samples runs/notus-7b-v1/final --reference REF --prompts prompts.jsonl
"""

import argparse
import gc
from pathlib import Path
from typing import Any

from notus.console import counted, emit
from notus.engine import distributed
from notus.errors import agreed
from notus.evals.answers import default_name
from notus.evals.options import BATCH_SIZES, NewPath, add_decoding_options, model_path
from notus.files import write_whole
from notus.generate.answering import open_answerer, respond_all
from notus.generate.prompts import PROMPT_ROWS, check_template, read_prompt_set
from notus.generate.samples import samples_markdown


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "samples",
        help="answers of a model and its reference to the same prompts, side by side",
        description="Let a model and its reference answer the same prompts and show both, as "
        "Markdown. Under torchrun the GPUs share the prompts.",
    )
    add = parser.add_argument
    about = "a Hugging Face folder, a run's output_dir, or a hub id"
    add("model", metavar="MODEL", type=model_path, help=about)
    add("--reference", required=True, type=model_path, metavar="REF", help="another of the same")
    add("--prompts", required=True, help=f"a file: rows {PROMPT_ROWS}, or a benchmark's questions")
    add("--out", type=Path, action=NewPath, metavar="FILE", help="(default: standard output)")
    add("--system-prompt", help="a system turn for conversations without one")
    add_decoding_options(parser, max_new_tokens=256, temperature=0.0)
    parser.set_defaults(run=answer_both)


def answer_both(options: argparse.Namespace) -> None:
    """Answer all prompts with both models and write or print the page. Collective."""
    ranks = distributed.start(options.device)
    with agreed():
        prompts, _ = read_prompt_set(options.prompts)
        folders = {}
        for role, model in (("reference", options.reference), ("policy", options.model)):
            folder, tokenizer = open_answerer(model)
            check_template(prompts, options.prompts, tokenizer)
            folders[f"{role}: {default_name(model)}"] = folder
    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "system_prompt", "dtype")
    settings = {key: getattr(options, key) for key in keys}
    settings["batch_size"] = options.batch_size or BATCH_SIZES["transformers"]
    columns = {}
    for name, folder in folders.items():
        columns[name] = respond_all(folder, prompts, device=ranks.device, **settings)
        gc.collect()  # the next model needs the memory
    text = samples_markdown(prompts, columns)
    if options.out is None:
        ranks.say(text, verbatim=True)
    elif ranks.first:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, text)
        emit(f"wrote {counted(len(prompts), 'prompts')} with both answers to {options.out}")
