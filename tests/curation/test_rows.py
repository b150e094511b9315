import gzip
import json
import re

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from notus.curation.rows import read_rows
from notus.errors import UserError


def write(path, *names):
    path.write_text("".join(json.dumps({"prompt": name}) + "\n" for name in names))


def prompts(path, split=None):
    return [row["prompt"] for _, row in read_rows(str(path), split)]


def test_every_file_type_gives_the_same_rows(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"Schön {i}?"}], "score": i} for i in (1, 2)]
    lines = "\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    (tmp_path / "array.json").write_text("\n" + json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    for name in ("lines.json", "array.json", "lines.jsonl.gz", "array.json.gz", "table.parquet"):
        path = str(tmp_path / name)
        assert list(read_rows(path)) == [(f"{path}:{n}", rows[n - 1]) for n in (1, 2)]


def test_saved_datasets(tmp_path):
    train, test = (
        datasets.Dataset.from_list([{"prompt": f"{name}{i}"} for i in range(2)])
        for name in ("train", "test")
    )
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert prompts(tmp_path / "one") == ["train0", "train1"]
    assert prompts(tmp_path / "both") == ["train0", "train1"]
    (first, _) = read_rows(str(tmp_path / "both"), "test")
    assert first == (f"{tmp_path / 'both' / 'test'}:1", {"prompt": "test0"})
    with pytest.raises(UserError, match='no split "dev"; the dataset has train, test'):
        prompts(tmp_path / "both", "dev")
    with pytest.raises(UserError, match='no split "dev"'):
        prompts(tmp_path / "one", "dev")


def test_a_folder_is_read_in_name_order_and_by_split(tmp_path):
    write(tmp_path / "b.jsonl", "b0")
    write(tmp_path / "a.jsonl", "a0")
    assert prompts(tmp_path) == ["a0", "b0"]
    write(tmp_path / "test-0.jsonl", "test0")
    assert prompts(tmp_path, "test") == ["test0"]
    write(tmp_path / "train-0.jsonl", "train0")
    assert prompts(tmp_path) == ["train0"]
    with pytest.raises(UserError, match='no file name contains the split "dev": a.jsonl, b.jsonl'):
        prompts(tmp_path, "dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "holds no rows"),
        ("e.json", b"[]", "holds no rows"),
        ("f.jsonl", b'"text"\n', "f.jsonl:1: the row is text; expected an object"),
        ("g.jsonl.gz", b"not gzip", "g.jsonl.gz: cannot be read"),
        ("h.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "h.jsonl.gz: cannot be read"),
        ("j.parquet", b"PAR", "cannot be read as Parquet"),
        ("k.txt", b"a,b", "expected a file that ends in .json"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prompts(tmp_path / name)


def test_parquet_text_that_is_not_utf_8(tmp_path):
    raw = pyarrow.array([b"\xff"])
    table = pyarrow.table({"prompt": pyarrow.Array.from_buffers(pyarrow.utf8(), 1, raw.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet: 'utf-8' codec"):
        prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_dict.json", "{}"),
        ("train/state.json", "{}"),
        ("train/state.json", "{"),
        ("train/dataset_info.json", "[]"),
        ("train/data-00000-of-00001.arrow", "ARROW1"),
    ],
)
def test_a_damaged_saved_dataset(tmp_path, name, content):
    rows = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read as a saved dataset: "):
        prompts(tmp_path)


@pytest.mark.parametrize("path", ["~nobody-here/a.jsonl", "a" * 300, "a\0.jsonl", "\ud800.jsonl"])
def test_a_path_that_no_file_can_have(path):
    with pytest.raises(UserError, match=re.escape(ascii(path)[1:-1])):
        prompts(path)


def test_what_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="absent.jsonl: no such file or folder"):
        prompts("absent.jsonl")
    with pytest.raises(UserError, match="no such file or folder"):
        prompts(tmp_path / "absent")
    with pytest.raises(UserError, match="the folder holds no .json"):
        prompts(tmp_path)
    for name in ("nobody/absent", "not a name"):
        with pytest.raises(UserError, match=f"{name}: neither a local .* reachable on the hub"):
            prompts(name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.csv", "a.parquet"])
def test_a_folder_or_a_link_to_nowhere_among_the_files(tmp_path, name):
    for place in (tmp_path / "folder", tmp_path / "link"):
        place.mkdir()
    (tmp_path / "folder" / name).mkdir()
    (tmp_path / "link" / name).symlink_to("nowhere")
    for place in (tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            prompts(place)
