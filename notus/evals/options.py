"""Options that commands share: bounded numbers, new files, decoding, --json and its report."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.console import emit
from notus.errors import UserError
from notus.evals.benchmarks import TOP_K
from notus.files import write_json

BATCH_SIZES = {"transformers": 32, "vllm": 256}


class NewPath(argparse.Action):
    """Store the path of a file or folder to be written; a UserError if it exists already."""

    def __call__(self, parser: Any, options: Any, path: Any, option: str | None = None) -> None:
        if os.path.lexists(path):
            raise UserError(f"{option} {path}: exists already and is not overwritten")
        setattr(options, self.dest, path)


def model_path(text: str) -> str:
    """A model's folder or hub id, for argparse; a run's output_dir becomes its final/."""
    final = Path(text) / "final"
    return str(final) if final.is_dir() and (Path(text) / "metrics.jsonl").is_file() else text


def at_least(minimum: float, kind: type = int, below: float = float("inf")) -> Callable[[str], Any]:
    """A converter for argparse: finite numbers of a type, from `minimum` on."""

    def number(text: str) -> Any:
        if not minimum <= kind(text) < below:
            limit = f" and below {below:g}" if below < float("inf") else ""
            expected = f"expected a number of at least {minimum}{limit}"
            raise argparse.ArgumentTypeError(f"{text}; {expected}")
        return kind(text)

    return number


def share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}; expected a number above 0 and at most 1")
    return float(text)


def add_decoding_options(
    parser: argparse.ArgumentParser,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
) -> None:
    """Add the options for decoding; a default of None stands for the benchmark's own."""
    sizes = ", ".join(f"{size} with {backend}" for backend, size in BATCH_SIZES.items())
    dtypes, stored = ("auto", "bfloat16", "float32"), "auto: that of the stored weights (default)"
    default = "(default: %(default)s; None: the benchmark's own)"
    add = parser.add_argument
    add("--max-new-tokens", type=at_least(1), default=max_new_tokens, help=default)
    add("--temperature", type=at_least(0, float), default=temperature, help=f"0: greedy {default}")
    add("--top-k", type=at_least(0), default=TOP_K, help="0: from all (default: %(default)s)")
    add("--top-p", type=share, default=1.0, help="of these, the most probable that make up this")
    add("--seed", type=at_least(0), default=0, help="(default: %(default)s)")
    add("--batch-size", type=at_least(1), help=f"prompts at a time (default: {sizes})")
    add("--dtype", choices=dtypes, default="auto", help=stored)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json FILE, for `report`."""
    parser.add_argument(
        "--json", type=Path, action=NewPath, metavar="FILE", help="write the numbers here too"
    )


def report(table: str, notes: Sequence[str], file: Path | None, content: Mapping[str, Any]) -> None:
    """Print a table and the notes on it; keep `content` and the notes in the file of --json."""
    emit("\n".join([table, "", *notes]))
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**content, "notes": notes})
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error}") from None
