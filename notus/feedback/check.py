"""Judging by checking: whether each response is right, for prompts that have an answer.

    python -m notus.feedback.check responses.jsonl --out checked
    python -m notus.feedback.check responses.jsonl --out checked --how number
    python -m notus.feedback.check responses.jsonl --out checked --check my_checks.py:passes_tests

The rated rows have a `ratings` column, 1 for a right response and 0 for another, or whatever number
your own function gives. `curation: {"rule": "rating"}` makes pairs of them.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from notus.console import run_command
from notus.curation.rows import Row, read_text
from notus.errors import UserError
from notus.feedback.responses import (
    Sampled,
    hash_of_rows,
    judge_parser,
    read_responses,
    write_rated,
)
from notus.generate.samples import is_right

Check = Callable[[str, Row], Any]  # a response and its row -> a number, true, false or None

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def check_exact(response: str, row: Row) -> bool:
    """Whether the response is the answer, apart from surrounding white space."""
    return is_right(response, row["answer"])


def check_number(response: str, row: Row) -> bool:
    """Whether the last number in the response is the answer; "1,000" is 1000, "2.50" is 2.5.

    Raises UserError if the answer is not a number.
    """
    numbers = _NUMBER.findall(response)
    return bool(numbers) and _decimal(numbers[-1]) == _decimal(row["answer"])


def _decimal(text: str) -> Decimal:
    if not _NUMBER.fullmatch(text.strip()):
        raise UserError(f'"answer" is {text[:40]!r}; expected a number for --how number')
    return Decimal(text.strip().replace(",", ""))


HOW: dict[str, Check] = {"exact": check_exact, "number": check_number}


def load_check(named: str) -> Check:
    """The function named by "FILE:FUNCTION", from a Python file that is run for it.

    Raises UserError if the file cannot be run or has no such function.
    """
    file, _, name = named.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"--check {named}: no such file; expected FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise UserError(f"--check {named}: {file} cannot be run ({error!r})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f'--check {named}: {file} has no function "{name}"')
    return function


def rate(sampled: Sampled, check: Check, needs_answer: bool) -> list[float | None]:
    """The rating of each response; None for all if a needed answer is missing.

    Raises UserError, which names the row, for an answer or a result of `check` of another kind, and
    for an exception in it.
    """
    where, row = sampled.where, sampled.row
    if needs_answer:
        if row.get("answer") is None:
            return [None] * len(sampled.responses)
        read_text(row, "answer", where)
    ratings = []
    for response in sampled.responses:
        try:
            found = check(response, row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (Exception, SystemExit) as error:  # the user's own code
            raise UserError(f"{where}: the check failed with {error!r}") from error
        if found is not None and not (isinstance(found, int | float) and abs(found) < 1e300):
            raise UserError(
                f"{where}: the check gave {found!r:.60}; expected a finite number, True, False or "
                "None"
            )
        ratings.append(None if found is None else float(found))
    return ratings


def judge(options: argparse.Namespace) -> str:
    """Rate the responses of a file into the new folder of --out; returns a line about it."""
    check = HOW[options.how] if options.check is None else load_check(options.check)
    sampled = read_responses(options.responses)
    rated = [one.row | {"ratings": rate(one, check, options.check is None)} for one in sampled]
    ratings = [rating for row in rated for rating in row["ratings"]]
    known = [rating for rating in ratings if rating is not None]
    if not known:
        raise UserError(f'{options.responses}: no response is rated; expected rows with "answer"')
    settings = {
        "judge": "check",
        "how": options.check or options.how,
        "responses": options.responses,
        "rows_sha256": hash_of_rows(sampled),
        "rows": len(rated),
        "rated": len(known),
        "not rated": len(ratings) - len(known),
        "mean rating": sum(known) / len(known),
    }
    write_rated(options.out, rated, settings)
    missing = f", {settings['not rated']:,} not rated" if settings["not rated"] else ""
    mean = settings["mean rating"]
    return f"wrote {options.out}: {len(known):,} responses rated, {mean:.4f} on average{missing}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = judge_parser("check", "Rate sampled responses by whether they are right.")
    add = parser.add_argument
    own = "your function (response, row) -> a number, True, False or None for not rated; it is run"
    add("--how", choices=HOW, default="exact", help="the answer, or as the last number in it")
    add("--check", metavar="FILE:FUNCTION", help=own)
    return run_command(lambda: judge(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
