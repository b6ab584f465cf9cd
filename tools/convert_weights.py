"""Convert a checkpoint of any layout; the same as `llava-lite convert`.

python tools/convert_weights.py path/to/llava-v1.5-7b weights/llava-1.5-7b --verify
"""

import argparse
import sys

from llava_lite.convert import add_arguments, run
from llava_lite.errors import LlavaLiteError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except LlavaLiteError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
