"""`python -m llava_lite`, the same program as `llava-lite`."""

import sys

from llava_lite.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
