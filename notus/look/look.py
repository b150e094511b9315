"""The command that makes a page of the pairs of a source: `python -m notus.look SOURCE`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from notus.console import run_command
from notus.curation.curate import Curation
from notus.curation.ratings import SEED
from notus.curation.report import look_command
from notus.data.sources import Source
from notus.errors import naming_options
from notus.files import write_whole, writing
from notus.look.gather import Gathering, gather
from notus.look.page import make_page
from notus.look.scores import MARGIN
from notus.look.selection import Selection
from notus.strict import Count, Seed, parse, plain, read_option


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m notus.look",
        description="Make one page to look at pairs, sort, filter and mark them, without a server.",
    )
    add = parser.add_argument
    about = "what training reads, or the folder of a curation, of eval.py preferences, of a run"
    add("source", help=about)
    add("--split", help="of the source, where it has splits")
    add("--format", help="of the source (default: recognized from the rows)")
    add("--columns", metavar="JSON", help='as in a training source, e.g. {"prompt": "Question"}')
    add("--ignore", nargs="+", metavar="NAME", help="columns and keys of messages to leave out")
    add("--curation", metavar="JSON", help='as in a training source, e.g. {"rule": "rating"}')
    add("--scores", type=Path, metavar="FILE", help="the pairs.jsonl of eval.py preferences")
    add("--rows", type=int, default=2000, help="at most so many in the page (2000)")
    add("--seed", type=int, default=SEED, help=f"of curation's draws and of the sample ({SEED})")
    add("--out", type=Path, required=True, help="the page; an earlier one is replaced")
    options = parser.parse_args(arguments)

    def command() -> str:
        with naming_options("format", "columns", "ignore", "curation"):
            return write_page(options)

    return run_command(command)


def write_page(options: argparse.Namespace) -> str:
    """Write the page that the options ask for; returns what it holds, in words."""
    most, seed = parse(options.rows, Count, "--rows"), parse(options.seed, Seed, "--seed")
    keys = {"path": options.source, "split": options.split, "format": options.format}
    keys |= {"columns": read_option("--columns", options.columns), "ignore": options.ignore}
    keys["curation"] = read_option("--curation", options.curation)
    source = parse(keys, Source)
    gathering = gather(source, seed, options.scores)
    selection = Selection(most, seed)
    for record in gathering:
        selection.add(record)
    records, chosen = selection.chosen()
    if gathering.scores:
        found, pairs = gathering.scores.found, gathering.counts["pairs"]
        chosen += f"; the model's scores are known for {found:,} of {pairs:,} pairs"
    content = page_content(gathering, records, selection.count, chosen)
    with writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, make_page(f"Pairs of {options.source}", content))
    return f"wrote {options.out}: {len(records):,} of {selection.count:,} rows, {chosen}"


def page_content(
    gathering: Gathering, records: Sequence[Any], count: int, chosen: str
) -> dict[str, Any]:
    """The data of the page; see page.js."""
    rule = gathering.source.curation and gathering.source.curation.rule
    return {
        "source": gathering.source.path,
        "rule": rule,
        "of": count,
        "chosen": chosen,
        "counts": gathering.counts,
        "sort": MARGIN if gathering.scores else None,
        "rows": records,
    }


def command_for(source: Source, seed: int) -> str:
    """The command that makes a page of a training source."""
    given = {"--split": source.split, "--format": source.format}
    if source.columns:
        given["--columns"] = json.dumps(source.columns, ensure_ascii=False)
    if source.curation:
        settings, defaults = plain(source.curation), plain(Curation())
        changed = {key: value for key, value in settings.items() if value != defaults[key]}
        given |= {"--curation": json.dumps(changed), "--seed": str(seed)}
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    if source.ignore:
        options += ["--ignore", *source.ignore]
    return look_command(source.path, *options)
