"""Find the image files of a data set in a folder. Nothing is opened here."""

import os
from pathlib import Path

from llava_lite.evaluation.suite import Sample


class ImageFolder:
    """Finds image files by name. Each name is looked up once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[tuple[str, ...], Path | None] = {}

    def find(self, *names: str) -> Path | None:
        """The first of these names that is a file in the folder. A name may be an absolute path."""
        if names not in self._found:
            paths = (self.folder / name for name in names)
            self._found[names] = next((path for path in paths if is_file(path)), None)
        return self._found[names]

    def sample(self, sample_id: str, prompt: str, *names: str) -> Sample:
        """A question about the first of these image files that exists, else with an error.

        Questions about the same names have the same image key, even if no file exists: shards and
        reports must not depend on the files of one machine."""
        path = self.find(*names)
        missing = self.folder / names[0]
        error = f"{missing}: no such image file" if path is None else None
        return Sample(sample_id, prompt, (path or missing,), "\n".join(names), error)


def is_file(path: Path) -> bool:
    """Whether the path is a file. A name that no file can have is not a file."""
    try:
        return os.path.isfile(path)
    except ValueError:
        return False
