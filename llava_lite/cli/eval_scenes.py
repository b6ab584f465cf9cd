"""`llava-lite eval scenes`: accuracy on freshly drawn scenes."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_model_arguments,
    natural,
    positive,
)
from llava_lite.cli.console import OK
from llava_lite.cli.progress import Progress
from llava_lite.cli.reduction import add_reduction_arguments
from llava_lite.cli.wanted import load_model, parse_reduction

if TYPE_CHECKING:
    from llava_lite.generation.model import Model
    from llava_lite.reduction import Reduction

SCENES_HELP = """\
An answer is right if it is exactly the expected text. The table has each family's accuracy with its
95 % interval (Wilson), the accuracy of all questions together, and the mean of the families.

families: count, count_color, count_shape, color, shape, exists, where, relation, digit, describe

examples:
  llava-lite eval scenes
  llava-lite eval scenes --n 500 --reduction folded-144-36 --families where digit --mistakes 5"""


def add_scenes(commands: Any) -> None:
    summary = "fresh drawn scenes of the embedded model's world, a question of every family"
    parser = add_command(commands, "scenes", run_scenes, "", summary, SCENES_HELP, "eval")
    add = parser.add_argument
    add("--n", type=positive, default=2000, metavar="N", help="scenes (default: 2000)")
    text = "which scenes (default: 20000)"
    add("--seed", type=natural, default=20_000, metavar="S", help=text)
    add("--families", nargs="+", metavar="NAME", help="only these questions")
    text = "who draws: plain, as in training (the default), or smooth, by other code"
    add("--renderer", choices=["plain", "smooth"], default="plain", help=text)
    text = "at once (default: 16)"
    add("--batch-size", type=positive, default=16, metavar="N", help=text)
    parser.set_defaults(no_pad=False, no_exif=False)
    add_reduction_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print one object")
    text = "wrong answers to show per family"
    add("--mistakes", type=natural, default=0, metavar="N", help=text)
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    add_model_arguments(parser)


def run_scenes(args: argparse.Namespace) -> int:
    """`llava-lite eval scenes`."""
    from llava_lite.evaluation.scenes.questions import PARAPHRASES
    from llava_lite.reduction import Reduction

    unknown = [name for name in args.families or () if name not in PARAPHRASES]
    if unknown:
        args.parser.error(f"no family {unknown[0]!r}; there are {', '.join(PARAPHRASES)}")
    reduction = Reduction.of(parse_reduction(args))
    from llava_lite.evaluation.scenes import accuracy

    scenes = list(accuracy.fresh_scenes(args.n, args.seed, args.families))
    model = load_model(args)
    with Progress("question", args.quiet) as progress:
        progress.start(sum(len(questions) for _, questions in scenes))
        tallies = accuracy.evaluate_scenes(
            model,
            scenes,
            reduction=reduction,
            batch_size=args.batch_size,
            draw=accuracy.RENDERERS[args.renderer],
            reuse_prefix=True,
            on_answer=progress.count,
        )
    settings = scene_settings(args, model, reduction)
    if args.json:
        print(json.dumps(accuracy.report(tallies, settings, args.mistakes)))
    else:
        print(", ".join(f"{name} {value}" for name, value in settings.items()))
        print("\n".join(accuracy.table(tallies, args.mistakes)))
    return OK


def scene_settings(
    args: argparse.Namespace, model: "Model", reduction: "Reduction"
) -> dict[str, Any]:
    """Everything that the accuracy depends on, as plain types."""
    from llava_lite.fast.quantize import find_method

    method = find_method(model.llava)
    return {
        "model": model.config.name,
        "dtype": str(model.llava.dtype).removeprefix("torch."),
        **({"quantize": method} if method else {}),
        "reduction": str(reduction),
        "renderer": args.renderer,
        "scenes": args.n,
        "seed": args.seed,
    }
