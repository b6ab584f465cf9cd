"""Find the image files of a data set in a folder. Nothing is opened here."""

import os
from collections.abc import Sequence
from pathlib import Path

from llava_lite.evaluation.suite import Sample
from llava_lite.generation.batch_file import URL


class ImageFolder:
    """Makes samples about image files of a folder. Each name is looked up once.

    `urls`: an image may also be a URL or a data URL."""

    def __init__(self, folder: Path, urls: bool = False) -> None:
        self.folder, self.urls = folder, urls
        self._found: dict[tuple[str, ...], Path | None] = {}

    def find(self, names: Sequence[str]) -> Path | None:
        """The first of these names that is a file in the folder. A name may be an absolute path."""
        key = tuple(names)
        if key not in self._found:
            paths = (self.folder / name for name in names)
            self._found[key] = next((path for path in paths if is_file(path)), None)
        return self._found[key]

    def sample(self, sample_id: str, prompt: str, *images: Sequence[str]) -> Sample:
        """A question about images, with an error if an image does not exist.

        `images`: the possible names of each image. Questions about the same names have the same
        image key, even if no file exists: shards and reports must not depend on the files of one
        machine."""
        sources: list[str | Path] = []
        error = None
        for names in images:
            is_url = self.urls and URL.match(names[0])
            source = names[0] if is_url else self.find(names)
            if source is None:
                source = self.folder / names[0]
                error = error or f"{source}: no such image file"
            sources.append(source)
        key = "\n".join(name for names in images for name in names) or None
        return Sample(sample_id, prompt, tuple(sources), key, error)


def is_file(path: Path) -> bool:
    """Whether the path is a file. A name that no file can have is not a file."""
    try:
        return os.path.isfile(path)
    except ValueError:
        return False
