"""The rows that SOURCE names, and their records."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from notus.curation.curate import Curation
from notus.curation.marks import Marks
from notus.curation.rated_rows import RATED
from notus.curation.text_files import reading
from notus.data.formats import find_format
from notus.data.sources import Reading, Source, prepared, read_found
from notus.errors import UserError
from notus.files import read_object
from notus.look.record import Record, make_record
from notus.look.scores import MARGIN, Scores
from notus.strict import Text, parse_part

CONTRADICTED = "the model contradicts the label"
# What `eval.py preferences` and an evaluation during training leave: pairs and their log-probs.
PAIRS = ("pairs.jsonl", "eval_pairs.jsonl")
MANIFEST = "manifest.json"  # of a folder that notus.curation wrote


class Gathering:
    """The records of a source's rows, and counts of all its rows once they have been read.

    counts: "rows", "pairs" and "dropped" (by reason) as curation counts them, and "pairs that the
    trainer drops" (by reason).
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        scores: Scores | None,
        held_out: Sequence[str] = (),
        expected: Mapping[str, int] | None = None,
    ) -> None:
        """seed, held_out: of the curation. expected: some of `counts`, from a manifest.

        Raises UserError if the curation's marks cannot be read.
        """
        self.source, self.seed, self.scores = source, seed, scores
        self._held_out, self._expected = held_out, expected
        self._marks = Marks(source.curation.marks if source.curation else None)
        self.counts: dict[str, Any] = {"rows": 0, "pairs": 0, "dropped": Counter()}
        self.counts["pairs that the trainer drops"] = Counter()

    def __iter__(self) -> Iterator[Record]:
        """Raises UserError as training and curation do, and if the rows are not those expected."""
        curation, unusable = self.source.curation, self.counts["pairs that the trainer drops"]
        for found in read_found(self.source, self.seed, self._held_out):
            self.counts["rows"] += 1
            for number, (pair, dropped) in enumerate(found.outcomes, start=1):
                if dropped:
                    self.counts["dropped"][dropped.reason] += 1
                else:
                    self.counts["pairs"] += 1
                record = make_record(found, pair, dropped, curation, self.seed, self._marks)
                if number > 1:
                    record["where"] += f", pair {number}"
                if record["unusable"]:
                    unusable[record["unusable"]] += 1
                if pair and self.scores:
                    record["numbers"] |= self.scores.of(pair)
                    if record["numbers"].get(MARGIN, 0) < 0:
                        record["flags"].append(CONTRADICTED)
                yield record
        for name, count in (self._expected or {}).items():
            if self.counts.get(name) != count:
                raise UserError(
                    f"{self.source.path}: gives {self.counts.get(name):,} {name} now, and gave "
                    f"{count:,} when the folder was made of it; expected unchanged rows, or the "
                    "folder's train.parquet as the source"
                )
        if self.scores and not self.scores.found:
            raise UserError(
                f"{self.scores.path}: none of its pairs is in {self.source.path} under this "
                "curation; expected the scores of these pairs"
            )


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A manifest of notus.curation, without the settings of a source and a curation."""

    input: Text
    counts: dict[str, Any]
    held_out: tuple[Text, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Counts:
    rows: int
    pairs: int


def gather(source: Source, seed: int, scores: Path | None) -> Gathering:
    """The records of the rows that `source` names.

    A folder of notus.curation names the rows that it was made of, under its settings; one of
    `eval.py preferences` its pairs with their scores, and a run's output_dir the held-out pairs
    with those of the newest evaluation. Rated rows without a curation get the rule that fits them.
    Raises UserError if a manifest, the scores or the first row is malformed, or a run has no
    held-out pairs.
    """
    held_out, expected = (), None
    with reading(source.path):  # no such home, a name that is too long
        folder = Path(source.path).expanduser()
        found = [folder / name for name in PAIRS if (folder / name).is_file()]
        is_run, file = (folder / "metrics.jsonl").is_file(), folder / MANIFEST
        manifest = read_object(file) if file.is_file() else {}
    if found:
        source = replace(source, path=str(found[0]))
    elif is_run:
        raise UserError(
            f"{folder}: a run without held-out pairs (data.eval); expected a run that has some, or "
            f"the folder that `python eval.py preferences {folder} --data FILE --out DIR` makes"
        )
    elif "input" in manifest:  # a judge's has none
        given = {key: value for key, value in manifest.items() if value not in (None, [])}
        made = parse_part(given, _Made, file)
        held_out, seed = made.held_out, seed if made.seed is None else made.seed
        expected = asdict(parse_part(made.counts, _Counts, f"{file}: counts"))
        curation = parse_part(given, Curation, file)
        source = parse_part(given | {"path": made.input}, Source, file)
        source = replace(source, curation=curation)
    where, row = next(prepared(source, Reading(source.path)))
    name = find_format(source.format, row, where, rated=True)
    if name in RATED and source.curation is None:
        source = replace(source, curation=Curation(rule=RATED[name].rules[0]))
    if scores is None and "policy_chosen" in row:
        scores = Path(source.path)
    return Gathering(source, seed, scores and Scores(scores), held_out, expected)
