"""The progress bar of every command that works through many items."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

    from llava_lite.saving import JsonObject


class Progress:
    """A bar on stderr. Hidden with `quiet`, and where stderr is not a terminal."""

    def __init__(self, unit: str, quiet: bool = False, **options: Any) -> None:
        hidden = quiet or not sys.stderr.isatty()
        self.options = {"unit": unit, "file": sys.stderr, "disable": hidden, **options}
        self.bar: tqdm | None = None
        self.failed = 0

    def start(self, total: int, done: int = 0) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total, initial=done, **self.options)

    def count(self, record: "JsonObject | None" = None) -> None:
        """One more item. A record with an "error" counts as failed."""
        assert self.bar is not None
        if record and "error" in record:
            self.failed += 1
            self.bar.set_postfix(failed=self.failed, refresh=False)
        self.bar.update()

    def show(self, done: int, total: int) -> None:
        """Move the bar to `done` of `total` items."""
        if self.bar is None:
            self.start(total)
        assert self.bar is not None
        self.bar.update(done - self.bar.n)

    def write(self, text: str) -> None:
        """Print one line above the bar."""
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
