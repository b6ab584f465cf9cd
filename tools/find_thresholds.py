"""Find thresholds for DToMe; the same as `llava-lite thresholds`.

Those of the embedded model, to be found again whenever its weights change:

python tools/draw_scenes.py --out scenes --count 300 --seed 30000
python tools/find_thresholds.py scenes -m weights/tiny -o weights/tiny/thresholds.json --force
"""

import sys

from llava_lite.cli.program import main

if __name__ == "__main__":
    sys.exit(main(["thresholds", *sys.argv[1:]]))
