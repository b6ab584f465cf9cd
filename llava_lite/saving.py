"""Write files: check the place first, append JSON lines under a lock, replace a file at once."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llava_lite.errors import LlavaLiteError

JsonObject = dict[str, Any]


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # no locks there


def check_output(
    path: Path, error_type: type[LlavaLiteError], force: bool = True, appends: bool = False
) -> None:
    """Raise the given error, before any work, if no file can be written to `path`.

    Without `force` an existing file is refused, too. With `appends` an existing file is written in
    place, so that its folder may be read-only."""
    folder = path.absolute().parent
    if path.is_dir():
        raise error_type(f"{path}: is a folder, the output must be a file")
    if not folder.is_dir():
        raise error_type(f"{path}: the folder {folder} does not exist")
    if appends and path.exists():
        if not os.access(path, os.W_OK):
            raise error_type(f"{path}: cannot be written to")
    elif not os.access(folder, os.W_OK):
        raise error_type(f"{path}: the folder {folder} cannot be written to")
    if path.exists() and not force:
        raise error_type(f"{path} already exists (use --force to overwrite)")


def parse_object(line: str | bytes, where: str, error_type: type[LlavaLiteError]) -> JsonObject:
    """One JSON object. Raises the given error, naming `where` the line stands."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_type(f"{where}: a {type(content).__name__}, not a JSON object")
    return content


def lock(file: BinaryIO, path: Path, error_type: type[LlavaLiteError]) -> None:
    """Lock an open file for this process until the file is closed, if the system has locks.

    Raises the given error if another process holds the lock, and OSError."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise error_type(f"{path}: another run is writing to it") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def lines_of(*objects: JsonObject) -> bytes:
    """The objects as JSON lines, to be written in one piece."""
    # Escaped to ASCII: no reader splits a line at a Unicode line separator in an answer.
    return "".join(json.dumps(one) + "\n" for one in objects).encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """`replace_file` with JSON."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file at once: even after a crash it is the old or the new file, never a mixture."""
    path = path.resolve()  # replace what a link points to, not the link
    staging = path.with_name(f".{path.name}.new")
    try:
        with open(staging, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
