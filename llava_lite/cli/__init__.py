"""The program `llava-lite`, one file a command; `program.py` is the place to start reading."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "main":  # the entry point, imported only when the program starts
        from llava_lite.cli.program import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
