"""Columns of a text table."""

from llava_lite.tables import table_lines, table_row


def test_columns_are_as_wide_as_their_text_and_empty_ones_are_left_out() -> None:
    rows = [
        {"": "one", "ms": "1", "empty": "", "why": "slow"},
        {"": "eleven", "ms": "12.25", "empty": "", "why": ""},
    ]
    assert list(table_lines(rows, ("", "why"))) == [
        "           ms  why",
        "one         1  slow",
        "eleven  12.25",
    ]


def test_a_row_fits_its_columns() -> None:
    assert table_row("<4 >3 0", "a", "7", " b ") == "a     7 b"
