"""The arguments of llava-lite thresholds."""

import argparse

from llava_lite.cli.program import build_parser


def parse(*argv: object) -> argparse.Namespace:
    return build_parser().parse_args(["thresholds", *map(str, argv)])
