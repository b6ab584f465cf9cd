"""Convert a checkpoint of any layout; the same as `llava-lite convert`.

python tools/convert_weights.py path/to/llava-v1.5-7b weights/llava-1.5-7b --verify
"""

import sys

from llava_lite.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
