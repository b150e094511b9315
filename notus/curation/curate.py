"""Sets of rated responses -> preference pairs: the rules, decontamination, and the command.

    python -m notus.curation INPUT --out DIR [--rule mean-rating] [--decontaminate FILE ...]

curates a file, folder or hub dataset into a new folder. A source in a training configuration that
has "curation" is curated the same way without files in between. With the same settings and seed
both give the same pairs.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from notus.curation.decontamination import (
    MATCHES,
    BenchmarkPrompts,
    Dropped,
    SeenPrompts,
    read_prompts,
)
from notus.curation.ratings import (
    REJECTED,
    RULES,
    Choice,
    RatedRow,
    choose_pair,
    find_rated_format,
)
from notus.curation.report import Summary, write_report
from notus.curation.rows import Row, read_rows, read_text
from notus.errors import UserError
from notus.files import new_folder
from notus.strict import Text

DUPLICATE = "duplicate prompt"
NEAR_DUPLICATE = "near-duplicate prompt"
HELD_OUT_PROMPT = "prompt of a held-out row"
DUPLICATES = ("keep", "exact", "near")


@dataclass(frozen=True, kw_only=True)
class Curation:
    """How rated completions become pairs, and which prompts are left out (of ready pairs too)."""

    # what ranks a row's completions: the mean of UltraFeedback's aspects (Notus), its overall
    # score (Zephyr) as published or corrected, or each response's own rating; null: ready pairs
    rule: Literal["mean-rating", "overall-score", "overall-score-fixed", "rating"] | None = None
    # drawn among the lower ones, the lowest, or drawn among all others, ties too, as for Zephyr
    rejected: Literal["random", "lowest", "zephyr"] = "random"
    decontaminate: tuple[Text, ...] | None = None  # files of benchmark prompts to leave out
    # a benchmark prompt is recognised by its text, also by its words, also by runs of 8 words
    match: Literal["exact", "normalised", "n-grams"] = "n-grams"
    drop_sources: tuple[Text, ...] | None = None  # rows to leave out by their "source"
    # of pairs with the same prompt, or nearly the same, only the first is kept
    duplicates: Literal["keep", "exact", "near"] = "keep"


class Screen:
    """Decides which rows are left out because of their prompt or their source."""

    def __init__(self, curation: Curation, held_out: Sequence[str] = ()) -> None:
        """held_out: files of prompts that no pair may repeat or nearly repeat.

        Raises:
            UserError: a file cannot be read, or holds no prompts.
        """
        self._sources = frozenset(curation.drop_sources or ())
        self._benchmarks = BenchmarkPrompts(curation.decontaminate or (), curation.match)
        self._duplicates = curation.duplicates
        self._seen = SeenPrompts(near=curation.duplicates == "near")
        self._held_out = SeenPrompts(near=True)
        for path in held_out:
            for where, prompt in read_prompts(path):
                self._held_out.add(prompt, where)

    def refuse(self, asked: Sequence[str], whole: str, row: Row, where: str) -> Dropped | None:
        """The reason to leave a row out whatever its responses are; None if there is none.

        asked: the texts of the user in the prompt; whole: the prompt as one text.
        """
        if self._sources and read_text(row, "source", where) in self._sources:
            return Dropped(f'source "{row["source"]}"')
        if hit := self._benchmarks.find(asked):
            return Dropped(f"{hit.kind} of {hit.benchmark}", hit)
        return Dropped(HELD_OUT_PROMPT) if self._held_out.find(whole) else None

    def repeated(self, whole: str, where: str) -> Dropped | None:
        """The reason to drop a pair with an earlier pair's prompt; else None, and it is noted."""
        if self._duplicates == "keep" or self._seen.add(whole, where) is None:
            return None
        return Dropped(DUPLICATE if self._duplicates == "exact" else NEAR_DUPLICATE)


def curate_row(
    rated: RatedRow, row: Row, where: str, curation: Curation, screen: Screen, seed: int
) -> Choice | Dropped:
    """The pair of a row of rated responses, or the reason why it gives none.

    Raises:
        UserError: a rating is out of range, or a response that would be in the pair is not text.
    """
    refused = screen.refuse([rated.prompt], rated.prompt, row, where)
    if refused:
        return refused
    try:
        choice = choose_pair(rated, curation.rule, seed, curation.rejected)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if isinstance(choice, str):
        return Dropped(choice)
    for completion in (choice.chosen, choice.rejected):
        read_text(completion, "response", where)
    return screen.repeated(rated.prompt, where) or choice


# ------------------------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class Settings(Curation):
    """The command's settings: those of a source, files of held-out prompts, and the draws' seed."""

    rule: str | None = "mean-rating"
    decontaminate: tuple[str, ...] = ()
    drop_sources: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    seed: int = 42


# The columns of argilla/ultrafeedback-binarized-preferences, Notus's training data.
SCHEMA = pyarrow.schema(
    [
        ("source", pyarrow.string()),
        ("instruction", pyarrow.string()),
        ("chosen_response", pyarrow.string()),
        ("rejected_response", pyarrow.string()),
        ("chosen_avg_rating", pyarrow.float64()),
        ("rejected_avg_rating", pyarrow.float64()),
        ("chosen_model", pyarrow.string()),
    ]
)


def curate(path: str, split: str | None, out: Path, settings: Settings) -> Summary:
    """Curate the rows at `path` (see `read_rows`) into the new folder `out`.

    It holds train.parquet and jsonl/train.jsonl (the same pairs, in Argilla's columns; the
    `*_avg_rating` are the scores under the rule), jsonl/dropped.jsonl (every other row and why),
    report.md with figures, and manifest.json (settings, hashes, counts). As a training source the
    folder is its Parquet file. It appears only when it is complete.

    Raises:
        UserError: `out` exists, a file cannot be read, a row or a rating is malformed, or no pair
            is left.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; expected the name of a new folder")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        with new_folder(out) as folder:
            return _fill(folder, path, split, settings)
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error}") from None
    finally:
        for folder in made:
            with suppress(OSError):  # there is no such folder, or it has got its content
                folder.rmdir()


def _fill(folder: Path, path: str, split: str | None, settings: Settings) -> Summary:
    """Write everything that `curate` promises into `folder`."""
    screen = Screen(settings, settings.held_out)
    summary, digest = Summary(), hashlib.sha256()
    pairs, dropped = [], []
    for where, row in tqdm(read_rows(path, split), unit=" rows", disable=None):
        digest.update(_canonical(row))
        rated = find_rated_format(row, where).read(row, where)
        outcome = curate_row(rated, row, where, settings, screen, settings.seed)
        summary.add(rated, outcome, where)
        if isinstance(outcome, Dropped):
            dropped.append(_record_of_dropped(rated, outcome, where))
        else:
            pairs.append(_record_of_pair(rated, outcome, where))
    if not pairs:
        rule = f'under the rule "{settings.rule}"'
        raise UserError(f"{path}: no pair is left {rule}; {_counts(summary)}")
    (folder / "jsonl").mkdir()
    for name, records in (("train", pairs), ("dropped", dropped)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / "jsonl" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    table = pyarrow.Table.from_pylist(pairs, SCHEMA)
    pyarrow.parquet.write_table(table, folder / "train.parquet", row_group_size=1000)
    described = {"input": path, "split": split or "train", **asdict(settings)}
    write_report(folder, summary, {key: _show(value) for key, value in described.items()})
    _write_manifest(folder, described, digest.hexdigest(), summary)
    return summary


def _record_of_pair(rated: RatedRow, choice: Choice, where: str) -> Row:
    model = choice.chosen.get("model")
    return {
        "source": rated.source,
        "instruction": rated.prompt,
        "chosen_response": choice.chosen["response"],
        "rejected_response": choice.rejected["response"],
        "chosen_avg_rating": choice.chosen_score,
        "rejected_avg_rating": choice.rejected_score,
        "chosen_model": None if model is None else read_text(choice.chosen, "model", where),
    }


def _record_of_dropped(rated: RatedRow, dropped: Dropped, where: str) -> Row:
    hit = {} if dropped.hit is None else dropped.hit._asdict()
    return {
        "row": where,
        "source": rated.source,
        "instruction": rated.prompt,
        "reason": dropped.reason,
        **{f"benchmark_{name}": value for name, value in hit.items()},
    }


def _canonical(row: Row) -> bytes:
    """A row's content as bytes, whatever the kind of file that it was read from."""
    return json.dumps(row, sort_keys=True, default=str).encode() + b"\n"


def _write_manifest(
    folder: Path, described: dict[str, Any], input_hash: str, summary: Summary
) -> None:
    rows_sha256 = {described["input"]: input_hash}
    for name in (*described["decontaminate"], *described["held_out"]):
        digest = hashlib.sha256()
        for _, row in read_rows(name):
            digest.update(_canonical(row))
        rows_sha256[name] = digest.hexdigest()
    manifest = {
        **described,
        "rows_sha256": rows_sha256,
        "counts": {
            "rows": summary.rows,
            "pairs": summary.pairs,
            "dropped": summary.dropped_by_reason,
            "pairs by source": dict(summary.kept),
            "pairs that the trainer drops": dict(summary.unusable),
        },
        "files_sha256": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in ("train.parquet", "jsonl/train.jsonl", "jsonl/dropped.jsonl")
        },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _show(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, tuple) else str(value)


def _counts(summary: Summary) -> str:
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in summary.dropped_by_reason.items())
    return f"{summary.rows:,} rows, dropped: {dropped or 'none'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m notus.curation",
        description="Curate a set of rated responses into preference pairs.",
    )
    add, defaults = parser.add_argument, Settings()
    files = {"action": "extend", "nargs": "+", "default": []}
    add("input", help="a JSON, JSONL or Parquet file, a folder, or a hub id")
    add("--split", help="a split of the input (default: train)")
    add("--out", required=True, type=Path, help="the folder to make")
    add("--rule", choices=RULES, default=defaults.rule, help="what ranks responses")
    add("--rejected", choices=REJECTED, default=defaults.rejected)
    add("--decontaminate", **files, metavar="FILE", help="benchmark prompts to leave out")
    add("--match", choices=MATCHES, default=defaults.match, help="how they are recognised")
    add("--held-out", **files, metavar="FILE", help="evaluation prompts to leave out")
    add("--drop-source", **files, metavar="NAME", help="leave out rows of this source")
    add("--duplicates", choices=DUPLICATES, default=defaults.duplicates, help="of prompts")
    add("--seed", type=int, default=defaults.seed, help="of the draw of rejected responses")
    options = parser.parse_intermixed_args(arguments)
    settings = Settings(
        rule=options.rule,
        rejected=options.rejected,
        decontaminate=tuple(options.decontaminate),
        match=options.match,
        drop_sources=tuple(options.drop_source),
        duplicates=options.duplicates,
        held_out=tuple(options.held_out),
        seed=options.seed,
    )
    try:
        summary = curate(options.input, options.split, options.out, settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}: {summary.pairs:,} pairs; {_counts(summary)}")
    return 0
