"""Text tables for a terminal."""

from collections.abc import Collection, Iterator, Mapping, Sequence


def table_row(align: str, *cells: str) -> str:
    """One line. `align`: alignment and width of each column, such as "<12 >9"; 0 fits the text."""
    specs = align.split()
    return "".join(f"{cell:{spec}}" for cell, spec in zip(cells, specs, strict=True)).rstrip()


def table_lines(rows: Sequence[Mapping[str, str]], left: Collection[str] = ("",)) -> Iterator[str]:
    """The lines of a table: a title for each key, then the rows. Columns are as wide as their text,
    right-aligned unless named in `left`. Empty columns are left out."""
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    widths = [max(len(title), *(len(row[title]) for row in rows)) for title in titles]
    aligned = [f"{'<' if t in left else '>'}{n}" for t, n in zip(titles, widths, strict=True)]
    for cells in (titles, *([row[title] for title in titles] for row in rows)):
        yield "  ".join(map(format, cells, aligned)).rstrip()
