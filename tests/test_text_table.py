import pytest

from sparse_moon.text_table import text_table

ROWS = [("name", "n", "note"), ("a", "10", ""), ("long name", "1.50 ", "x"), ("total", "11.5", "")]


def test_columns_are_aligned_and_ruled():
    assert text_table(ROWS, "lrl", total=True).splitlines() == [
        "name           n  note",
        "----------------------",
        "a             10",
        "long name  1.50   x",
        "----------------------",
        "total       11.5",
    ]
    assert text_table(ROWS[:1], "lrl").splitlines() == ["name  n  note", "-------------"]


@pytest.mark.parametrize(("rows", "align"), [(ROWS, "lr"), ([("a", "b"), ("c",)], "ll")])
def test_rows_must_have_all_columns(rows, align):
    with pytest.raises(ValueError, match="argument"):
        text_table(rows, align)
