"""The command that curates a set: `python -m notus.curation INPUT --out DIR`.

It curates a file, folder or hub dataset of rated responses into a new folder. A training source
with "curation" is curated the same way without files in between; with the same settings and seed
both give the same pairs. Rows that are pairs already are screened, and written as they were read.
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, starmap
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pyarrow.parquet
from tqdm import tqdm

from notus.console import counted, run_command
from notus.curation.curate import (
    Curation,
    Screen,
    check_ready,
    check_rule,
    curate_row,
    reason_to_drop,
    screen_ready,
)
from notus.curation.decontamination import Dropped, whole_text
from notus.curation.rated_rows import RATED
from notus.curation.ratings import RULES, SEED, aspect_ratings
from notus.curation.records import (
    TEXTS,
    record_of_dropped,
    record_of_pair,
    record_of_ready,
    row_of_pair,
    table_of,
    write_lines,
)
from notus.curation.report import NO_SOURCE, look_command, write_report
from notus.curation.rows import PlacedRow, Row, read_rows
from notus.data.columns import complete
from notus.data.formats import FORMATS, find_format
from notus.data.pairs import labels_of
from notus.data.sources import Reading, Source, prepared
from notus.errors import UserError, naming_options
from notus.files import new_folder, write_json
from notus.strict import Positive, parse, read_option


def curate(
    source: Source, out: Path, held_out: Sequence[str], seed: int, reading: Reading | None = None
) -> dict[str, Any]:
    """Curate the rows of a source into the new folder `out`; returns its counts.

    The folder holds the pairs, jsonl/dropped.jsonl (every other row and why), report.md with
    figures, and manifest.json (settings, hashes, counts). The pairs of rated rows are in
    train.parquet and jsonl/train.jsonl, in Argilla's columns, or as messages where a prompt has
    several turns; the scores are those under the rule. Rows that are pairs already are in
    train.jsonl, as they were read, or as messages where their format has to be named. As a training
    source the folder is its pairs. It appears only when it is complete. With rejected "all-lower" a
    row may give several pairs, each of which is kept or dropped, so the counts are of pairs there.

    curation.rule: None for a format's usual one. held_out: as for `Screen`. seed: of the draws of
    rejected responses. reading: is filled. Raises UserError if `out` exists or cannot be written, a
    file cannot be read, a row or a rating is malformed, no pair is left, or a mark belongs to no
    row.
    """
    path, curation = source.path, source.curation or Curation()
    reading = reading or Reading(path)
    rows = prepared(source, reading)
    where, row = first = next(rows)
    name = reading.format = find_format(source.format, row, where, rated=True)
    if name in RATED:
        curation = replace(curation, rule=curation.rule or RATED[name].rules[0])
        check_rule(path, name, curation.rule)
    else:
        check_ready(path, name, curation)
    settings = {"input": path, "split": source.split or "train", **asdict(curation)}
    settings |= {"held_out": tuple(held_out), "seed": seed}
    others = {key: getattr(source, key) for key in ("format", "columns", "ignore")}
    settings |= {key: value for key, value in others.items() if value}
    with new_folder(out) as folder:
        screen, digest = Screen(curation, held_out), hashlib.sha256()
        rows = tqdm(chain([first], rows), unit=" rows", disable=None)
        rows = _digested(rows, digest)
        if name in RATED:
            found = _rated_records(name, rows, curation, screen, seed)
        else:
            found = _ready_records(name, rows, screen)
        screen.marks.require_all_found()
        marked = [
            {"row": where, "mark": mark.mark or "note", "note": mark.note}
            for where, mark in screen.marks.found
        ]
        counts = _counts(found)
        if marked:
            counts["marks"] = Counter(mark["mark"] for mark in marked)
        if not found.pairs:
            text = _counts_text(counts, curation)
            rule = f' under the rule "{curation.rule}"' if curation.rule else ""
            raise UserError(f"{path}: no pair is left{rule}; {text}")
        (folder / "jsonl").mkdir()
        files = ["jsonl/dropped.jsonl"]
        write_lines(folder / "jsonl/dropped.jsonl", found.dropped)
        if name in RATED:
            written = table_of(found.pairs, path)
            write_lines(folder / "jsonl/train.jsonl", written.to_pylist())
            pyarrow.parquet.write_table(written, folder / "train.parquet", row_group_size=1000)
            files += ["train.parquet", "jsonl/train.jsonl"]
        else:
            write_lines(folder / "train.jsonl", found.rows)
            files.append("train.jsonl")
        write_report(
            folder, out, settings, counts, found.pairs, found.dropped, found.ratings, marked
        )
        rows_sha256 = {path: digest.hexdigest()}
        others = (*(curation.decontaminate or ()), *held_out, *filter(None, [curation.marks]))
        for other in others:
            content = b"".join(_canonical(row) for _, row in read_rows(other))
            rows_sha256[other] = hashlib.sha256(content).hexdigest()
        hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}
        results = {"rows_sha256": rows_sha256, "counts": counts, "files_sha256": hashes}
        if marked:
            results["marked"] = marked
        write_json(folder / "manifest.json", settings | results)
    return counts


@dataclass
class _Found:
    """Records of pairs (by the names in `SCHEMA`) and of dropped rows, and what else is reported.

    ratings: of all completions, by aspect. rows: those of ready pairs, as they were read. count: of
    all rows.
    """

    pairs: list[Row] = field(default_factory=list)
    dropped: list[Row] = field(default_factory=list)
    ratings: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rows: list[Row] = field(default_factory=list)
    count: int = 0


def _digested(rows: Iterable[PlacedRow], digest: Any) -> Iterator[PlacedRow]:
    for where, row in rows:
        digest.update(_canonical(row))
        yield where, row


def _rated_records(
    name: str, rows: Iterator[PlacedRow], curation: Curation, screen: Screen, seed: int
) -> _Found:
    found = _Found()
    gather = RATED[name].gather
    for where, row in gather(rows) if gather else rows:
        rated = RATED[name].read(row, where)
        found.count += 1
        for outcome in curate_row(rated, row, where, curation, screen, seed):
            if isinstance(outcome, Dropped):
                found.dropped.append(record_of_dropped(rated.prompt, rated.source, outcome, where))
            else:
                found.pairs.append(record_of_pair(name, rated, outcome, row, where))
        for completion in rated.completions:
            with suppress(UserError):  # a rating out of range, which the rule does not use
                for aspect, rating in list(aspect_ratings(completion)):
                    found.ratings[aspect].append(rating)
    return found


def _ready_records(name: str, rows: Iterator[PlacedRow], screen: Screen) -> _Found:
    found = _Found()
    for where, row in rows:
        found.count += 1
        outcome = FORMATS[name].convert(row, where)
        source = labels_of(row).get("source")
        if isinstance(outcome, Dropped):
            found.dropped.append(record_of_dropped(None, source, outcome, where))
            continue
        (read,) = outcome
        pair, left_out = screen_ready(read, name, row, screen)
        if left_out:
            prompt = whole_text(pair.prompt)
            found.dropped.append(record_of_dropped(prompt, source, left_out, where))
        else:
            completed = complete(pair, name, row, where)  # refuses what training would lose
            found.pairs.append(record_of_ready(pair, source))
            if pair is not read:  # a mark swaps it, and the other columns may say the contrary
                row = row_of_pair(completed, source)
            elif FORMATS[name].recognises is None:
                others = {key: row[key] for key in row if key not in FORMATS[name].reads}
                row = others | row_of_pair(completed, source)
            found.rows.append(row)
    return found


def _counts(found: _Found) -> dict[str, Any]:
    texts = ([pair[name] for name in TEXTS[1:]] for pair in found.pairs)
    return {
        "rows": found.count,
        "pairs": len(found.pairs),
        "dropped": Counter(record["reason"] for record in found.dropped),
        "pairs by source": Counter(pair["source"] or NO_SOURCE for pair in found.pairs),
        "pairs that the trainer drops": Counter(filter(None, starmap(reason_to_drop, texts))),
    }


def _canonical(row: Row) -> bytes:
    """A row's content as bytes, whatever the kind of file that it was read from."""
    return json.dumps(row, sort_keys=True, default=str).encode() + b"\n"


def _counts_text(counts: dict[str, Any], curation: Curation) -> str:
    dropped, marks, unusable = (
        ", ".join(f"{n:,} {name}" for name, n in counts.get(kind, {}).items())
        for kind in ("dropped", "marks", "pairs that the trainer drops")
    )
    text = f"{counted(counts['rows'], 'rows')}, dropped: {dropped or 'none'}"
    text += f"; of these pairs training drops: {unusable}" if unusable else ""
    text += f"; marks: {marks}" if marks else ""
    return text if curation.decontaminate else f"{text}; not screened for benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m notus.curation",
        description="Curate a set of rated responses into preference pairs, or screen pairs.",
    )
    add, kinds, defaults = parser.add_argument, get_type_hints(Curation), Curation()
    files = {"action": "extend", "nargs": "+", "default": []}
    add("input", help="a JSON, JSONL or Parquet file, a folder, or a hub id")
    add("--split", help="a split of the input (default: train)")
    add("--out", required=True, type=Path, help="the folder to make")
    add("--format", choices=FORMATS, help="of the rows (default: seen from them)")
    add("--columns", metavar="JSON", help='as in a training source, e.g. {"prompt": "Question"}')
    add("--ignore", nargs="+", metavar="NAME", help="columns and keys of messages to leave out")
    add("--rule", choices=RULES, help="what ranks responses (default: mean-rating, or rating)")
    add("--decontaminate", **files, metavar="FILE", help="benchmark prompts to leave out")
    add("--held-out", **files, metavar="FILE", help="evaluation prompts to leave out")
    add("--drop-source", **files, metavar="NAME", help="leave out rows of this source")
    choices = {
        "rejected": "which response is rejected",
        "match": "how benchmark prompts are recognised",
        "duplicates": "which repeated prompts are kept",
    }
    for name, text in choices.items():
        known, usual = get_args(kinds[name]), getattr(defaults, name)
        add(f"--{name}", choices=known, help=f"{text} (default: {usual})")
    add("--min-margin", type=float, help="the least difference of a pair's scores")
    add("--min-chosen", type=float, help="the least score of a chosen response")
    add("--agree", action="store_true", help="no aspect may rate the rejected response higher")
    add("--marks", metavar="FILE", help="marks that the page of notus.look saved")
    add("--seed", type=int, default=SEED, help=f"of the draw of rejected responses ({SEED})")
    options = parser.parse_intermixed_args(arguments)
    reading = Reading(options.input)

    def command() -> str:
        if options.match and not options.decontaminate:
            raise UserError(f"--match {options.match}: has no effect without --decontaminate FILE")
        curation = Curation(
            rule=options.rule,
            decontaminate=tuple(options.decontaminate),
            drop_sources=tuple(options.drop_source),
            min_margin=parse(options.min_margin, Positive | None, "--min-margin"),
            min_chosen=parse(options.min_chosen, float | None, "--min-chosen"),
            agree=options.agree,
            marks=options.marks,
            **{name: getattr(options, name) or getattr(defaults, name) for name in choices},
        )
        keys = {"path": options.input, "split": options.split, "format": options.format}
        keys |= {"columns": read_option("--columns", options.columns), "ignore": options.ignore}
        source = replace(parse(keys, Source), curation=curation)
        with naming_options("format", "columns", "ignore", "rule"):
            counts = curate(source, options.out, options.held_out, options.seed, reading)
        pairs = counted(counts["pairs"], "pairs")
        told = f"wrote {options.out}: {pairs}; {_counts_text(counts, curation)}"
        look = f"look at the rows:\n  {look_command(options.out)}"
        return "\n".join((*reading.lines(), told, look))

    return run_command(command)
