"""Judging by checking: what is right, what is refused, and the folder that curation reads."""

import json

import pytest

from notus.curation.curate import Curation
from notus.data.preferences import Source, load_preferences
from notus.feedback import check
from notus.feedback.check import check_exact, check_number

ROWS = [
    {"prompt": "2 + 3?", "answer": "5", "responses": ["5", "6", " 5\n"], "seeds": [1, 2, 3]},
    {"prompt": "Name a pet.", "responses": ["cat", "sun"], "source": "pets"},
    {"prompt": "1 + 1?", "answer": "2", "responses": ["It is 3.", "1 + 1 = 2"], "seeds": [1, 2]},
]


@pytest.fixture
def responses(tmp_path):
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def judge(responses, *more):
    """The exit code, and the ratings of each row if there are any."""
    out = responses.parent / "checked"
    code = check.main([str(responses), "--out", str(out), *more])
    if not out.exists():
        return code, None
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "ratings"} for row in rows] == ROWS
    return code, [row["ratings"] for row in rows]


def test_exact_answers_and_rows_without_one(responses, capsys):
    assert judge(responses) == (0, [[1, 0, 1], [None, None], [0, 0]])
    assert "5 responses rated, 0.4000 on average, 2 not rated" in capsys.readouterr().out
    manifest = json.loads((responses.parent / "checked/manifest.json").read_text())
    assert manifest["how"] == "exact" and (manifest["rated"], manifest["not rated"]) == (5, 2)
    assert manifest["files_sha256"].keys() == {"train.jsonl"}
    assert check.main(["no/such.jsonl", "--out", str(responses.parent / "checked")]) == 2
    assert "checked: exists already and is not overwritten" in capsys.readouterr().err


def test_the_last_number_of_a_response(responses):
    assert judge(responses, "--how", "number") == (0, [[1, 0, 1], [None, None], [0, 1]])
    for answer, right in (("1,000.50", "so 1000.5."), ("-3", "x = -3"), ("7", "3 + 4 is 7.")):
        assert check_number(right, {"answer": answer})
    for answer, wrong in (("7", "7 or 8"), ("7", "seven"), ("3", "x = -3"), ("7", "")):
        assert not check_number(wrong, {"answer": answer})
    assert check_exact(" 7\n", {"answer": "7"}) and not check_exact("7.", {"answer": "7"})


def test_your_own_function(responses, capsys):
    file = responses.parent / "own.py"
    file.write_text(
        "def length(response, row):\n    return len(response) / len(row['responses'])\n"
    )
    ratings = [[len(text) / len(row["responses"]) for text in row["responses"]] for row in ROWS]
    assert judge(responses, "--check", f"{file}:length") == (0, ratings)


def test_the_folder_is_a_training_source(responses):
    judge(responses)
    source = Source(path=str(responses.parent / "checked"), curation=Curation(rule="rating"))
    (pair,) = load_preferences([source], seed=0).train
    assert pair.prompt == [{"role": "user", "content": "2 + 3?"}]
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("5", "6")
    assert (pair.chosen_score, pair.rejected_score) == (1.0, 0.0)


def test_half_a_character_in_another_column_is_kept(responses):
    responses.write_text(
        '{"prompt": "\u00e9", "answer": "5", "responses": ["5", "6"], "x": "\\ud800"}'
    )
    assert check.main([str(responses), "--out", str(responses.parent / "checked")]) == 0
    text = (responses.parent / "checked/train.jsonl").read_text(encoding="utf-8")
    assert json.loads(text)["x"] == "\ud800" and '"prompt": "\u00e9"' in text


def test_a_name_that_is_too_long(responses, capsys):
    assert check.main([str(responses), "--out", "a" * 300]) == 2
    assert "cannot be written ([Errno 36] File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", (), "holds no rows"),
        ('{"prompt": "a", "responses": ["b"]}', (), ":1: 1 responses; expected at least two"),
        ('{"prompt": "a"}', (), ':1: "responses" is missing; expected a list of texts'),
        ('{"prompt": "a", "responses": ["b", null]}', (), '"responses" holds null; expected texts'),
        (
            '{"prompt": [{"role": "assistant", "content": "a"}], "responses": ["b", "c"]}',
            (),
            ':1: "prompt" ends with a message of the assistant; expected one of the user',
        ),
        (
            '{"prompt": [{"role": "user", "content": "a", "name": "n"}], "responses": ["b", "c"]}',
            (),
            ':1: "prompt[0]" holds more than text',
        ),
        ('{"prompt": [], "responses": ["b", "c"]}', (), '"prompt" ends with no message; expected'),
        (
            '{"prompt": "a", "responses": ["b", "c"]}',
            (),
            "no response is rated; expected rows with",
        ),
        (
            '{"prompt": "a", "responses": ["b", "2"], "answer": "two"}',
            ("--how", "number"),
            ":1: \"answer\" is 'two'; expected a number",
        ),
        (None, ("--check", "none.py:f"), "--check none.py:f: no such file; expected FILE.py:FUNC"),
        (None, ("--check", "OWN:missing"), 'has no function "missing"'),
        (None, ("--check", "OWN:text"), ":1: the check gave 'x'; expected a finite"),
        (None, ("--check", "OWN:fails"), ":1: the check failed with ZeroDivisionError"),
        (None, ("--check", "OWN:leaves"), ":1: the check failed with SystemExit(0)"),
        (None, ("--check", "OWN:unknown"), ":1: the check gave nan; expected a finite number"),
        (None, ("--check", "OWN:huge"), ":1: the check gave 1000"),
        (None, ("--check", "LEAVES:f"), "leaves.py cannot be run (SystemExit(0))"),
    ],
)
def test_mistakes_get_one_message_and_write_nothing(responses, text, more, message, capsys):
    own = responses.parent / "own.py"
    own.write_text(
        "import sys\ntext = lambda response, row: 'x'\nfails = lambda response, row: 1 / 0\n"
        "leaves = lambda response, row: sys.exit(0)\nunknown = lambda response, row: float('nan')\n"
        "huge = lambda response, row: 10**400\n"
    )
    leaves = own.with_name("leaves.py")
    leaves.write_text("raise SystemExit(0)\n")
    if text is not None:
        responses.write_text(text)
    more = [one.replace("OWN", str(own)).replace("LEAVES", str(leaves)) for one in more]
    assert judge(responses, *more) == (2, None)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path.name for path in responses.parent.iterdir()} <= {
        "responses.jsonl",
        "own.py",
        "leaves.py",
        "__pycache__",
    }
