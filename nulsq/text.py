"""Text for people: durations, lists of names, aligned columns, Markdown tables."""

from collections.abc import Collection, Sequence


def duration(seconds: float) -> str:
    """90 -> 1m30s, 7200 -> 2h00m"""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] | None = None) -> list[str]:
    """Rows of cells as lines with aligned columns, two spaces apart.

    left: indices of the columns that are aligned to the left; None aligns all to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if left is None or i in left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def shortened(names: Sequence[str], count: int = 3) -> str:
    """The first names; five at a count of three: a, b, c and 2 more"""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the header first, as the lines of a Markdown table."""
    header, *body = rows
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
