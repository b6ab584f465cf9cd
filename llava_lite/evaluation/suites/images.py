"""Images of a data set that lie in a folder: samples name their files, nothing is opened."""

import os
from pathlib import Path

from llava_lite.evaluation.suite import Sample


class ImageFolder:
    """Finds image files by name; each is looked for once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[tuple[str, ...], Path | None] = {}

    def find(self, *names: str) -> Path | None:
        """The first of these names that is a file in the folder; an absolute name stands alone."""
        if names not in self._found:
            paths = (self.folder / name for name in names)
            self._found[names] = next((path for path in paths if is_file(path)), None)
        return self._found[names]

    def sample(self, sample_id: str, prompt: str, *names: str) -> Sample:
        """A question about the image of the first name that is there, or with the error that none
        is.

        What is asked about the same names shows the same image, there or not: shards and reports
        must not depend on the files of a machine."""
        path = self.find(*names)
        missing = self.folder / names[0]
        error = f"{missing}: no such image file" if path is None else None
        return Sample(sample_id, prompt, (path or missing,), "\n".join(names), error)


def is_file(path: Path) -> bool:
    """Whether the path is a file; a name that no file can have is none."""
    try:
        return os.path.isfile(path)
    except ValueError:
        return False
