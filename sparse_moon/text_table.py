"""Tables for a terminal."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], align: str, *, total: bool = False) -> str:
    """Cells in columns two spaces apart, with a rule below the headings; no line ends in a space.

    Args:
        rows: the headings, and then the lines.
        align: for each column ``l`` or ``r``, to which side its cells are aligned.
        total: whether the last row is the sum of those before, with a rule above it.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to = {"l": str.ljust, "r": str.rjust}
    lines = ["  ".join(to[a](cell, w) for a, cell, w in zip(align, row, widths, strict=True)) for row in rows]
    rule = "-" * len(lines[0])
    lines.insert(1, rule)
    if total:
        lines.insert(-1, rule)
    return "\n".join(line.rstrip() for line in lines)
