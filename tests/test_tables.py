"""Tables compared with ones written by hand."""

from notus.tables import markdown_table, text_table

HEADER = ("name", "value", "n", "none")
ROWS = [["a", 1.005, 10, None], ["long", None, 7000, None]]


def test_text_tables_align_numbers_to_the_right():
    assert text_table(HEADER, ROWS, digits=1).splitlines() == [
        "name  value     n  none",
        "a       1.0    10     -",
        "long      -  7000     -",
    ]


def test_a_table_folds_behind_its_key_columns(narrow):
    narrow(40)
    rows = [["a", "x", 1, "y" * 20, 22], ["b", "x", 3, "y" * 20, 4]]
    header = ("key", "other", "first", "second", "third")
    table = "\n".join(line.rstrip() for line in text_table(header, rows, keys=2).splitlines())
    assert table.split("\n\n") == [
        "key  other  first  second\n"
        "a    x          1  yyyyyyyyyyyyyyyyyyyy\n"
        "b    x          3  yyyyyyyyyyyyyyyyyyyy",
        "key  other  third\na    x         22\nb    x          4",
    ]
    wide = text_table(("key", "n"), [["k" * 50, 1]])
    assert len(wide.splitlines()) == 2  # a column cannot be folded


def test_markdown_tables_separate_thousands():
    assert markdown_table(HEADER, iter(ROWS), digits=1).splitlines() == [
        "| name | value | n | none |",
        "|---|--:|--:|--:|",
        "| a | 1.0 | 10 | - |",
        "| long | - | 7,000 | - |",
    ]


def test_a_markdown_cell_remains_one_cell():
    assert markdown_table(["text"], [["a|b\nc"]]).splitlines()[-1] == "| a\\|b c |"


def test_a_table_without_rows_has_its_header():
    assert text_table(["a", "bc"], []) == "a  bc"
    assert markdown_table(["a", "bc"], []) == "| a | bc |\n|--:|--:|"
