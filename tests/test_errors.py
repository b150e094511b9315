import pytest

from notus.errors import UserError, naming_options


@pytest.mark.parametrize(
    ("advice", "options"),
    [
        ('expected "ignore": ["my tools"] in the source', "--ignore 'my tools'"),
        ('give it "format": "turns", or "ignore": ["x"]', "--format turns, --ignore x"),
        ('"columns": {"prompt": ...} in the source', "--columns '{\"prompt\": ...}'"),
        ('"curation": {"rule": "rating"}', "--rule rating"),
    ],
)
def test_advice_about_a_source_is_told_as_options(advice, options):
    with pytest.raises(UserError) as raised, naming_options("format", "columns", "ignore", "rule"):
        raise UserError(f"a.jsonl:1: {advice}", "a second line")
    assert str(raised.value).splitlines() == [
        f"a.jsonl:1: {advice}",
        "  a second line",
        f"  as options of this command: {options}",
    ]


@pytest.mark.parametrize("message", ['the column "format" is missing', '"split": "test"', "odd"])
def test_other_messages_stay(message):
    with pytest.raises(UserError) as raised, naming_options("format", "columns", "ignore"):
        raise UserError(message)
    assert str(raised.value) == message
