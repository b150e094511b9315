"""Sets of rated responses -> preference pairs: the rule, decontamination, and what was left out.

    python -m notus.curation INPUT --out DIR [--rule mean-rating] [--decontaminate FILE ...]

curates a file, folder or hub dataset into a folder of its own; a source in a training
configuration that has "curation" goes the same way without files in between. With the same
settings and seed both give the same pairs.
"""

import argparse
import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from notus.curation.rows import PlacedRow, Row, read_rows, read_text
from notus.errors import UserError
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
    """Which rows stay out of the training data because of their prompt or their source."""

    def __init__(self, curation: Curation, held_out: Sequence[str] = ()) -> None:
        """held_out: files of prompts that no pair may repeat, or nearly so.

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
        """Why a row gives no pair whatever its responses; None if it may.

        asked: the texts that the prompt asks; whole: the prompt as one text.
        """
        if self._sources and read_text(row, "source", where) in self._sources:
            return Dropped(f'source "{row["source"]}"')
        if hit := self._benchmarks.find(asked):
            return Dropped(f"{hit.kind} of {hit.benchmark}", hit)
        return Dropped(HELD_OUT_PROMPT) if self._held_out.find(whole) else None

    def repeated(self, whole: str, where: str) -> Dropped | None:
        """Whether a pair's prompt came before in another pair; notes it if it did not."""
        if self._duplicates == "keep" or self._seen.add(whole, where) is None:
            return None
        return Dropped(DUPLICATE if self._duplicates == "exact" else NEAR_DUPLICATE)


def curate_row(
    rated: RatedRow, row: Row, where: str, curation: Curation, screen: Screen, seed: int
) -> Choice | Dropped:
    """The pair of a row of rated responses, or why it gives none.

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
    """Curates the rows at `path` (see `read_rows`) into the new folder `out`.

    It holds train.parquet and jsonl/train.jsonl (the same pairs, in Argilla's columns; the
    `*_avg_rating` are the scores under the rule), jsonl/dropped.jsonl (every other row and why),
    report.md with figures, and manifest.json (settings, hashes, counts). As a training source the
    folder is its Parquet file. It appears whole, or not at all.

    Raises:
        UserError: `out` exists, a file cannot be read, a row or a rating is malformed, or no pair
            is left.
    """
    with new_folder(out) as folder:
        screen = Screen(settings, settings.held_out)
        summary, digest = Summary(), hashlib.sha256()
        (folder / "jsonl").mkdir()
        with (
            pyarrow.parquet.ParquetWriter(folder / "train.parquet", SCHEMA) as parquet,
            open(folder / "jsonl" / "train.jsonl", "w", encoding="utf-8") as train,
            open(folder / "jsonl" / "dropped.jsonl", "w", encoding="utf-8") as dropped,
        ):
            batch: list[Row] = []
            for where, row in tqdm(read_rows(path, split), unit=" rows", disable=None):
                digest.update(_canonical(row))
                rated = find_rated_format(row, where).read(row, where)
                outcome = curate_row(rated, row, where, settings, screen, settings.seed)
                summary.add(rated, outcome, where)
                if isinstance(outcome, Dropped):
                    _write_line(dropped, _record_of_dropped(rated, outcome, where))
                    continue
                batch.append(_record_of_pair(rated, outcome, where))
                _write_line(train, batch[-1])
                if len(batch) == 1000:
                    parquet.write_table(pyarrow.Table.from_pylist(batch, SCHEMA))
                    batch = []
            parquet.write_table(pyarrow.Table.from_pylist(batch, SCHEMA))
        if not summary.pairs:
            rule = f'under the rule "{settings.rule}"'
            raise UserError(f"{path}: no pair is left {rule}; {_counts(summary)}")
        described = {"input": path, "split": split or "train", **asdict(settings)}
        write_report(folder, summary, {key: _show(value) for key, value in described.items()})
        _write_manifest(folder, described, digest.hexdigest(), summary)
    return summary


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name at the end, or vanishes on an error.

    Raises:
        UserError: `path` exists already or cannot be made.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: exists already; expected the name of a new folder")
    # A random name: a run that is killed leaves its folder, and process numbers come again.
    partial = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # there is no such folder, or it has got its content
                folder.rmdir()


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
    record = {"row": where, "source": rated.source, "instruction": rated.prompt}
    hit = {} if dropped.hit is None else dropped.hit._asdict()
    return {**record, "reason": dropped.reason, **{f"benchmark_{k}": v for k, v in hit.items()}}


def _write_line(file: Any, record: Row) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _canonical(row: Row) -> bytes:
    """A row's content as bytes, whatever the kind of file that it was read from."""
    return json.dumps(row, sort_keys=True, default=str).encode() + b"\n"


def _write_manifest(
    folder: Path, described: dict[str, Any], input_hash: str, summary: Summary
) -> None:
    prompts = {
        name: _hash_of_rows(read_rows(name))
        for name in (*described["decontaminate"], *described["held_out"])
    }
    manifest = {
        **described,
        "rows_sha256": {described["input"]: input_hash, **prompts},
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


def _hash_of_rows(rows: Iterable[PlacedRow]) -> str:
    digest = hashlib.sha256()
    for _, row in rows:
        digest.update(_canonical(row))
    return digest.hexdigest()


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
    parser.add_argument("input", help="a JSON, JSONL or Parquet file, a folder, or a hub id")
    parser.add_argument("--split", help="a split of the input (default: train)")
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--rule", choices=RULES, default=Settings.rule, help="what ranks responses")
    parser.add_argument("--rejected", choices=REJECTED, default=Settings.rejected)
    files = {"action": "extend", "nargs": "+", "default": [], "metavar": "FILE"}
    parser.add_argument("--decontaminate", **files, help="benchmark prompts, to be left out")
    parser.add_argument(
        "--match",
        choices=MATCHES,
        default=Settings.match,
        help="how a benchmark prompt is recognised",
    )
    parser.add_argument("--held-out", **files, help="prompts to evaluate on, to be left out")
    parser.add_argument(
        "--drop-source", **files | {"metavar": "NAME"}, help="rows whose source is left out"
    )
    parser.add_argument(
        "--duplicates", choices=DUPLICATES, default=Settings.duplicates, help="of prompts"
    )
    parser.add_argument(
        "--seed", type=int, default=Settings.seed, help="of the draw of rejected responses"
    )
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


if __name__ == "__main__":
    sys.exit(main())
