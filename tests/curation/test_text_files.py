"""Files of JSON and CSV: their rows, and the messages about mistakes in them."""

import csv
import gzip
import json
import runpy

import pytest

from notus.curation import text_files
from notus.curation.rows import read_rows
from notus.errors import UserError

PRETTY = json.dumps({"prompt": "a", "chosen": "b"}, indent=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"prompt": "a"}\n{oops\n', "b.jsonl:2: not JSON"),
        ("c.json", b'[\n{"chosen": "a"},\n{oops\n]', "c.json:3: not JSON"),
        ("i.jsonl", b'{"prompt": "\xff"}', "i.jsonl: cannot be read: 'utf-8' codec"),
        ("deep.json", b"[" * 100_000, "deep.json:1: cannot be read: maximum recursion"),
        ("digits.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "digits.jsonl:1: cannot .*4300 digits"),
        (
            "deep.jsonl",
            b'{"prompt": 1}\n' + b"[" * 100_000,
            "deep.jsonl:2: cannot be read: maximum rec",
        ),
        (
            "one.json",
            PRETTY.encode(),
            "one.json:1: not JSON: its object does not end on this",
        ),
        ("two.jsonl", b'{"a": 1}\n{"a": 2,\n"b": 3}', "two.jsonl:2: not JSON: its object does not"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv:2: the row has 3 cells, .* 2 column names \(a, b\)"),
        (
            "b.csv",
            b'a,b\n"1\n2",\n\n"3\n',
            "b.csv:5: the row that begins here is not CSV: unexpected end",
        ),
        ("c.csv", b'a,b\n1,"2" 3\n', "c.csv:2: the row that begins here is not CSV: ',' exp"),
        ("d.csv", b"a,b,a\n1,2,3\n", 'd.csv:1: two columns have the name "a"'),
        ("e.csv", "a,b\n1,caf\xe9\n".encode("cp1252"), "e.csv: cannot .*UTF-8 .*iconv -f cp1252"),
        ("f.csv", b"a,b\n", "f.csv: holds no rows"),
    ],
)
def test_an_unreadable_text_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


def test_a_pretty_printed_object_is_one_command_from_a_row(tmp_path):
    (tmp_path / "one.json").write_text(PRETTY)
    with pytest.raises(UserError) as raised:
        list(read_rows(str(tmp_path / "one.json")))
    command = str(raised.value).splitlines()[-1].partition("python -m ")[2].split()
    assert command[:2] == ["json.tool", "--no-indent"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr("sys.argv", command)
        runpy.run_module(command[0], run_name="__main__")
    (row,) = read_rows(str(tmp_path / "rows.jsonl"))
    assert row[1] == json.loads(PRETTY)


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_a_row_of_a_spreadsheet_is_named_by_the_line_it_begins_on(tmp_path, separator):
    rows = [["Why;\tso,?", "So\nit is."], ["", ""], ["How?", 'By "hand".\n\n']]
    file = tmp_path / "a.csv"
    with file.open("w", newline="", encoding="utf-8-sig") as text:
        writer = csv.writer(text, delimiter=separator)
        writer.writerow(["Question", " Good\nanswer"])
        writer.writerows(rows)
        text.write("\r\n")  # an empty line is no row
        writer.writerow(["Last?", "Yes."])
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    begins = [3, 5, 6, 10]  # the names take two lines
    for path in (file, packed):
        found = list(read_rows(str(path)))
        assert [where for where, _ in found] == [f"{path}:{line}" for line in begins]
        assert [list(row.values()) for _, row in found] == [*rows, ["Last?", "Yes."]]
        assert list(found[0][1]) == ["Question", "Good\nanswer"]


def test_a_line_may_be_so_long(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": "ä" * n}, ensure_ascii=False) for n in (3, 20)]
    file.write_text("".join(line + "\r\n" for line in lines), encoding="utf-8")
    assert len(list(read_rows(str(file), longest_line=len(lines[1])))) == 2
    with pytest.raises(UserError, match=r"rows.jsonl:2: found a line of more than 33 characters"):
        list(read_rows(str(file), longest_line=len(lines[1]) - 1))


@pytest.mark.parametrize("content", [b"\n", b"[", b" "])
def test_a_gz_file_does_not_grow_beyond_reason(tmp_path, monkeypatch, content):
    monkeypatch.setattr(text_files, "LOOKED_AT", 2**16)
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(content * 2**20))  # 1000 times as large as the file
    with pytest.raises(UserError, match="rows.jsonl.gz: grows to more than 200 times its size"):
        list(read_rows(str(file)))
    monkeypatch.setattr(text_files, "LOOKED_AT", 2**21)
    with pytest.raises(UserError, match="holds no rows|not JSON|cannot be read"):
        list(read_rows(str(file)))
