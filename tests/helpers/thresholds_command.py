"""The arguments of llava-lite thresholds."""

import argparse

from llava_lite.cli import thresholds as command


def parse(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_thresholds_arguments(parser)
    return parser.parse_args([str(argument) for argument in argv])
