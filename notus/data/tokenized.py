"""A data set's tokens, made once in parallel processes and kept in a file that all ranks map.

A file is named after what its tokens depend on: the texts, the tokenizer with its template, the
settings and the code. It is Arrow with a single row, so that the arrays of `TokenizedPairs` are
views of the mapped file: ranks on one machine share its pages, and none reads what it does not use.
"""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from notus.data import special_tokens, tokenization
from notus.data.preferences import Pair
from notus.data.tokenization import Tokenized, TokenizedPairs, tokenize_pairs
from notus.errors import UserError

# Fewer pairs are tokenized in less time than it takes to start processes and to look for a file.
WORTH_KEEPING = 2000
PAIRS_PER_SHARE = 500  # that a process tokenizes at once; the progress bar moves after each
MOST_PROCESSES = 16  # each takes a few hundred MB
ARRAYS = ("tokens", "hidden", "lengths", "kept", "whole_lengths")


def tokens_file(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]
) -> Path:
    """Where the tokens of `pairs` belong: a file in the cache folder of `datasets`.

    settings: the keyword arguments of `tokenize_pairs`.
    """
    import datasets  # only where it is needed: importing it takes a while

    code = inspect.getsource(tokenization) + inspect.getsource(special_tokens)
    depends_on = {
        "code": hashlib.sha256(code.encode()).hexdigest(),
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
        "settings": dict(settings),
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for pair in pairs:
        content = (pair.prompt, pair.chosen, pair.rejected, pair.implied)
        digest.update(json.dumps(content).encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / "notus-tokens" / f"{digest.hexdigest()}.arrow"


def tokenize_once(
    file: Path,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerFast,
    settings: Mapping[str, Any],
    *,
    processes: int | None = None,
    progress: bool = True,
) -> Tokenized:
    """The tokens of `pairs`, from `file` if it holds them, else computed and written there.

    file: that of `tokens_file`. processes: None for one a core; the tokens do not depend on it.
    Raises UserError as `tokenize_pairs` does, and where the file cannot be written.
    """
    found = read_tokens(file)
    if found is not None:
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=".partial-") as scratch:
            parts = _tokenize_shares(
                pairs, tokenizer, settings, Path(scratch), processes=processes, progress=progress
            )
            write_tokens(file, Tokenized.join(parts))
    except OSError as error:
        raise UserError(
            f"{file.parent}: the tokens cannot be kept there ({error}); expected a folder with "
            "space that can be written, which the environment variable HF_DATASETS_CACHE names"
        ) from None
    return read_tokens(file)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _tokenize_shares(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerFast,
    settings: Mapping[str, Any],
    scratch: Path,
    *,
    processes: int | None,
    progress: bool,
) -> list[Tokenized]:
    import datasets

    if processes is None:
        processes = min(_usable_cores(), MOST_PROCESSES, len(pairs) // PAIRS_PER_SHARE)

    texts = [json.dumps(vars(pair)) for pair in pairs]
    if not progress:
        datasets.disable_progress_bars()
    shares = datasets.Dataset.from_dict({"pair": texts}).map(
        partial(_tokenize_share, tokenizer=tokenizer, settings=dict(settings)),
        batched=True,
        batch_size=PAIRS_PER_SHARE,
        remove_columns="pair",
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(scratch / "shares.arrow"),
        new_fingerprint="tokens",  # the file's name says what it depends on; no function is hashed
        desc="Tokenizing",
    )
    return [_tokenized(row) for row in _rows(shares.data.table)]


def _tokenize_share(
    rows: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
) -> pyarrow.Table:
    pairs = [Pair(**json.loads(text)) for text in rows["pair"]]
    return _table(tokenize_pairs(pairs, tokenizer, **settings))


def write_tokens(file: Path, tokenized: Tokenized) -> None:
    """Write a file for `read_tokens`; it has its name once it is whole."""
    table = _table(tokenized)
    partial_file = file.with_name(f".partial-{os.getpid()}-{file.name}")
    with (
        pyarrow.OSFile(str(partial_file), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    os.replace(partial_file, file)


def read_tokens(file: Path) -> Tokenized | None:
    """What `write_tokens` wrote, its arrays read-only views of the mapped file.

    None when there is no such file or when its pairs are not those that were written.
    """
    if not file.is_file():
        return None
    try:
        with pyarrow.memory_map(str(file)) as source:
            row = next(_rows(pyarrow.ipc.open_file(source).read_all()))
    except pyarrow.ArrowInvalid:
        return None
    found = _tokenized(row)
    return found if found.pairs.fingerprint() == row["fingerprint"].as_py() else None


def _table(tokenized: Tokenized) -> pyarrow.Table:
    """A table of one row: the arrays as lists, what is left as JSON, and the fingerprint."""
    pairs = tokenized.pairs
    arrays = {
        "tokens": pairs.tokens,
        "hidden": pairs.hidden.view(np.uint8),  # Arrow would pack booleans into bits
        "lengths": pairs.lengths,
        "kept": tokenized.kept,
        "whole_lengths": tokenized.whole_lengths,
    }
    columns = {
        name: pyarrow.LargeListArray.from_arrays(
            pyarrow.array([0, array.size], pyarrow.int64()), pyarrow.array(array.reshape(-1))
        )
        for name, array in arrays.items()
    }
    rest = {name: getattr(tokenized, name) for name in ("inputs", "counts", "examples")}
    columns |= {"rest": [json.dumps(rest)], "fingerprint": [pairs.fingerprint()]}
    return pyarrow.table(columns)


def _rows(table: pyarrow.Table) -> Iterator[dict[str, pyarrow.Scalar]]:
    for batch in table.to_batches():
        for index in range(batch.num_rows):
            yield {name: batch.column(name)[index] for name in batch.schema.names}


def _tokenized(row: Mapping[str, pyarrow.Scalar]) -> Tokenized:
    arrays = {name: row[name].values.to_numpy(zero_copy_only=True) for name in ARRAYS}
    lengths, whole_lengths = (arrays[n].reshape(-1, 3) for n in ("lengths", "whole_lengths"))
    return Tokenized(
        TokenizedPairs(arrays["tokens"], arrays["hidden"].view(bool), lengths),
        kept=arrays["kept"],
        whole_lengths=whole_lengths,
        **json.loads(row["rest"].as_py()),
    )
