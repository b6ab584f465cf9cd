"""Rows of text tables for a terminal."""


def table_row(align: str, *cells: str) -> str:
    """One line. `align`: alignment and width of each column, such as "<12 >9"; 0 fits the text."""
    specs = align.split()
    return "".join(f"{cell:{spec}}" for cell, spec in zip(cells, specs, strict=True)).rstrip()
