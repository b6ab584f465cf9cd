"""Convert a checkpoint of any layout; the same as `llava-lite convert`.

python tools/convert_weights.py path/to/llava-v1.5-7b weights/llava-1.5-7b --verify
"""

import argparse
import sys

from llava_lite.console import one_line, say
from llava_lite.convert import add_arguments, run
from llava_lite.errors import LlavaLiteError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except (LlavaLiteError, OSError, ValueError) as error:
        say(f"error: {one_line(error)}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
