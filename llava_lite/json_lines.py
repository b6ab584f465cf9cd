"""Files of JSON lines that only grow: one object a line, written whole."""

import json
from typing import Any

from llava_lite.errors import LlavaLiteError

JsonObject = dict[str, Any]


def parse_object(line: str | bytes, where: str, error_type: type[LlavaLiteError]) -> JsonObject:
    """One JSON object. Raises the given error, naming `where` the line stands."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{where}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise error_type(f"{where}: a {type(content).__name__}, not a JSON object")
    return content


def lines_of(*objects: JsonObject) -> bytes:
    """The objects as lines, to write in one piece."""
    # Escaped to ASCII: no reader splits a line at a Unicode line separator in an answer.
    return "".join(json.dumps(one) + "\n" for one in objects).encode()
