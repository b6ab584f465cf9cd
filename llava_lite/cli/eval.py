"""`llava-lite eval`: one command for each data set, `scenes` for drawn ones, `report` for answers
that are there.

What is slow to import is imported where it is used.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_model_arguments,
    add_ray_arguments,
    add_sampling_arguments,
    natural,
    parse_cluster,
    positive,
    shard,
)
from llava_lite.cli.console import (
    FAILED,
    OK,
    WRONG_USAGE,
    say,
)
from llava_lite.cli.reduction import add_reduction_arguments
from llava_lite.cli.wanted import (
    default_source,
    generation_options,
    load_model,
    load_options,
    parse_reduction,
)
from llava_lite.errors import EvaluationError
from llava_lite.evaluation.suite import Suite
from llava_lite.evaluation.suites.registry import (
    SUITES,
    Exporting,
    SuiteKind,
    open_suite,
    split_paths,
)
from llava_lite.integrations import ray_batch
from llava_lite.saving import JsonObject, check_output, replace_file, replace_json

if TYPE_CHECKING:
    from llava_lite.evaluation.report import Evaluation
    from llava_lite.evaluation.runner import Ask
    from llava_lite.generation.sampling import GenerationOptions

SCENES_HELP = """\
An answer is right when it is exactly the expected text. The table has the 95 % interval (Wilson) of
each family's accuracy, that of all questions together, and the mean of the families.

families: count, count_color, count_shape, color, shape, exists, where, relation, digit, describe

examples:
  llava-lite eval scenes
  llava-lite eval scenes --n 500 --reduction hybrid-72-36 --families where digit --mistakes 5"""


EVAL_HELP = """\
examples:
  llava-lite eval mmbench MMBench_DEV_EN.tsv -o runs/mmbench -m weights/llava-1.5-7b
  llava-lite eval coco val2014/ captions_val2014.json -o runs/coco --limit 500
  llava-lite eval jsonl questions.jsonl -o runs/own --reduction hybrid-72-36
  llava-lite eval report runs/shard-*/ -o runs/all
  llava-lite eval --data-file coco_val_500.json --report-file report.json

`llava-lite eval WHAT --help` explains each."""


SUITE_HELP = """\
DIR gets predictions.jsonl (every setting, and a line for every answer as soon as it is there),
report.json, and report.html, a page that needs no network. Prompts are the official ones, answers
greedy unless told otherwise. A sample that fails (bad image, prompt too long) costs no other one;
the exit code is then 1.

Photos are turned as their camera noted (EXIF) unless --no-exif is given; LLaVA does not turn them.
VizWiz's line about questions that cannot be answered is not added to the prompt. What LLaVA
publishes of TextVQA needs --ocr.

After a crash or Ctrl-C the same command with --reuse goes on where it stopped. It refuses answers
that were given with other settings. Shards on N machines get a DIR each; `llava-lite eval report
DIR... -o DIR` makes one report of them. With --ray models in several actors answer into one DIR;
--reuse goes on with or without it."""


REPORT_HELP = """\
The data set is opened where it was; --files says where it is now. The answers must have been given
with the same settings.

examples:
  llava-lite eval report runs/mmbench
  llava-lite eval report runs/shard-1 runs/shard-2 -o runs/all"""


# How the options of data sets look as flags; all others take a text.
SWITCHES = ("circular", "ocr", "short_answer")


CHOICES = {"language": ("en", "cn")}


def with_command(argv: Sequence[str]) -> list[str]:
    """`eval --data-file FILE` means `eval data-file FILE`."""
    if argv[:1] != ["eval"]:
        return list(argv)
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == "--data-file" and (equals or position + 1 < len(argv)):
            end = position + (1 if equals else 2)
            file = value if equals else argv[position + 1]
            return ["eval", "data-file", file, *argv[1:position], *argv[end:]]
    return list(argv)


# ---- arguments -----------------------------------------------------------------------------------


def add_eval(commands: Any) -> None:
    summary = "measure how often answers are right: MMBench, COCO, POPE, VQA, your own data"
    usage = "WHAT FILES -o DIR"
    parser = add_command(commands, "eval", lambda _: WRONG_USAGE, usage, summary, EVAL_HELP)
    commands = parser.add_subparsers(prog="llava-lite eval", metavar="WHAT [...]", required=True)
    add_scenes(commands)
    for name, kind in SUITES.items():
        add_data_set(commands, name, kind)
    add_report(commands)


def add_scenes(commands: Any) -> None:
    parser = add_command(
        commands,
        "scenes",
        run_scenes,
        "",
        "fresh drawn scenes of the embedded model's world, a question of every family",
        SCENES_HELP,
        within="eval ",
    )
    add = parser.add_argument
    add("--n", type=positive, default=2000, metavar="N", help="scenes (default: 2000)")
    words = "which scenes (default: 20000)"
    add("--seed", type=natural, default=20_000, metavar="S", help=words)
    add("--families", nargs="+", metavar="NAME", help="only these questions")
    add(
        "--renderer",
        choices=["plain", "smooth"],
        default="plain",
        help="who draws: plain, as in training (the default), or smooth, by other code",
    )
    words = "at once (default: 16)"
    add("--batch-size", type=positive, default=16, metavar="N", help=words)
    parser.set_defaults(no_pad=False, no_exif=False)
    add_reduction_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one object")
    words = "wrong answers to show per family"
    output.add_argument("--mistakes", type=natural, default=0, metavar="N", help=words)
    output.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_model_arguments(parser)


def add_data_set(commands: Any, name: str, kind: SuiteKind) -> None:
    parser = add_command(
        commands,
        name,
        run_data_set,
        f"{kind.usage} -o DIR",
        kind.summary,
        SUITE_HELP,
        within="eval ",
    )
    parser.set_defaults(suite=name)
    parser.add_argument("paths", metavar="PATH", nargs="+", help=f"in any order: {kind.usage}")
    for option, words in kind.options.items():
        add_option(parser, option, words)
    add_run_arguments(parser)
    add_ray_arguments(parser)
    add_sampling_arguments(parser, "what the data set asks for")
    add_output_arguments(parser)
    add_model_arguments(parser)


def add_option(parser: argparse.ArgumentParser, option: str, words: str) -> None:
    """One option of a data set as a flag."""
    flag = f"--{option.replace('_', '-')}"
    if option in SWITCHES:
        parser.add_argument(flag, action="store_true", default=None, help=words)
    else:
        parser.add_argument(flag, choices=CHOICES.get(option), metavar="NAME", help=words)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which samples, and how many at once."""
    group = parser.add_argument_group("samples")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N")
    group.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="only every N-th image from the I-th on, I = 1..N, for N machines with a DIR each",
    )
    group.add_argument(
        "--batch-size", type=positive, metavar="N", help="asked at once (default: 8)"
    )
    group.add_argument(
        "--workers",
        type=natural,
        default=2,
        metavar="N",
        help="threads that open images ahead of the model (default: 2; 0: none)",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where everything goes, and what becomes of what is there."""
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="DIR", help="folder of predictions and report")
    group.add_argument(
        "--report-file",
        metavar="FILE",
        help="write the JSON report there, too (without -o, DIR is FILE without its suffix)",
    )
    group.add_argument(
        "--reuse", action="store_true", help="go on with the predictions that DIR holds"
    )
    group.add_argument(
        "--retry-errors", action="store_true", help="with --reuse: ask again what failed"
    )
    group.add_argument("--force", action="store_true", help="replace the predictions in DIR")
    group.add_argument(
        "--export", metavar="FILE", help="write the answers as the data set's server takes them"
    )
    group.add_argument("--json", action="store_true", help="print the report, no table")
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def add_report(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        "DIR...",
        "make the report of answers that are there, of one or several shards",
        REPORT_HELP,
        within="eval ",
    )
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folders that an evaluation wrote")
    words = "folder for the report (default: that one; of several, none)"
    add("-o", "--output", metavar="DIR", help=words)
    add("--report-file", metavar="FILE", help="write the JSON report there, too")
    add("--files", nargs="+", metavar="FILE", help="the data set's files, where they moved")
    add("--export", metavar="FILE", help="write the answers as the data set's server takes them")
    add("--json", action="store_true", help="print the report, no table")


# ---- a data set ----------------------------------------------------------------------------------


def run_data_set(args: argparse.Namespace) -> int:
    """`llava-lite eval mmbench`, and so on."""
    folder = output_folder(args)
    cluster = parse_cluster(args)
    options = generation_options(args)
    reopen = suite_arguments(args)
    check_outputs(args, folder)
    suite = suite_of(reopen)
    check_export(args, suite)
    options["max_new_tokens"] = options["max_new_tokens"] or suite.max_new_tokens
    from llava_lite.evaluation import predictions, report
    from llava_lite.evaluation.settings import answer_settings
    from llava_lite.generation.sampling import GenerationOptions

    wishes = GenerationOptions(**options)
    settings = answer_settings(suite, wishes)
    path = folder / predictions.FILE_NAME
    predictions.check(path, args.reuse, args.force, settings)
    ask = asking(args, wishes, cluster)
    answer(args, suite, ask, settings, folder, reopen)
    found = predictions.read_predictions(path)
    return deliver(args, report.Evaluation.of(suite, [(str(folder), found)]), folder)


def output_folder(args: argparse.Namespace) -> Path:
    """Where predictions go; wrong usage shows here."""
    if args.retry_errors and not args.reuse:
        args.parser.error("--retry-errors needs --reuse")
    if args.reuse and args.force:
        args.parser.error("--reuse goes on with the predictions, --force replaces them: give one")
    if args.output is None and args.report_file is None:
        args.parser.error("a folder for predictions and report is needed: -o DIR")
    if args.output is not None:
        return Path(args.output)
    folder = Path(args.report_file).with_suffix("")
    if folder == Path(args.report_file):
        args.parser.error("a folder for predictions is needed: -o DIR")
    return folder


def suite_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Name, paths and options of the suite as plain types, to open it now and for a report. Too
    many paths or too few are wrong usage."""
    paths = [Path(path).absolute() for path in args.paths]
    if all(path.exists() for path in paths):
        try:
            split_paths(args.suite, paths)
        except EvaluationError as error:
            args.parser.error(str(error))
    options = {name: getattr(args, name) for name in SUITES[args.suite].options}
    return {"name": args.suite, "paths": list(map(str, paths)), "options": options}


def suite_of(arguments: Mapping[str, Any]) -> Suite:
    """The suite of `suite_arguments`."""
    paths = [Path(path) for path in arguments["paths"]]
    return open_suite(arguments["name"], paths, **arguments["options"])


def check_export(args: argparse.Namespace, suite: Suite) -> None:
    """Wrong usage where the data set has no format for answers."""
    if args.export and not isinstance(suite, Exporting):
        args.parser.error(f"--export: {suite.name} has no format for answers")


def check_outputs(args: argparse.Namespace, folder: Path | None) -> None:
    """Raise EvaluationError where a result could not be written, before anything is asked."""
    if folder is not None:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise EvaluationError(f"{folder}: {there} is not a folder")
        if not os.access(there, os.W_OK):
            raise EvaluationError(f"{folder}: {there} cannot be written to")
    for name in (args.report_file, args.export):
        if name is None:
            continue
        path = Path(name)
        will_exist = folder is not None and path.absolute().parent == folder.absolute()
        if path.parent.exists() or not will_exist:
            check_output(path, EvaluationError)


def asking(
    args: argparse.Namespace,
    options: "GenerationOptions",
    cluster: ray_batch.Cluster | None,
) -> "Ask":
    """Who answers: the actors of a cluster, or a model that is loaded here."""
    named, wanted = default_source(args.model), load_options(args)
    if cluster is not None:
        from llava_lite.integrations.ray_eval import asking_actors

        source = ray_batch.ModelSource(named, wanted)
        return asking_actors(source, cluster, options, args.batch_size, args.workers)
    from llava_lite.evaluation.engine import Engine
    from llava_lite.evaluation.runner import asking_here
    from llava_lite.evaluation.settings import Origin, model_settings

    model = load_model(args)
    engine = Engine(model, options, args.batch_size, args.workers)
    return asking_here(engine, model_settings(model, Origin.of(named, wanted), options))


def answer(
    args: argparse.Namespace,
    suite: Suite,
    ask: "Ask",
    settings: Mapping[str, Any],
    folder: Path,
    reopen: Mapping[str, Any],
) -> None:
    """Ask what is missing, with a bar of progress."""
    from llava_lite.evaluation.runner import Files, Selection, run

    progress = Progress(args.quiet)
    try:
        run(
            suite.samples(),
            ask,
            Files(folder, args.reuse, args.retry_errors, args.force),
            settings,
            Selection(args.limit, args.shard),
            reopen,
            progress.start,
            progress.count,
        )
    except KeyboardInterrupt:
        if not args.quiet:
            say(f"{folder} keeps what was answered; --reuse goes on from there")
        raise
    finally:
        progress.close()


class Progress:
    """A bar of answered samples on stderr, only where that is a terminal."""

    def __init__(self, quiet: bool) -> None:
        self.hidden = quiet or not sys.stderr.isatty()
        self.failed = 0
        self.bar: Any = None

    def start(self, total: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, initial=done, unit="sample", file=sys.stderr, disable=self.hidden
        )

    def count(self, record: "JsonObject") -> None:
        if "error" in record:
            self.failed += 1
            self.bar.set_postfix(failed=self.failed, refresh=False)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- report --------------------------------------------------------------------------------------


def run_report(args: argparse.Namespace) -> int:
    """`llava-lite eval report`."""
    from llava_lite.evaluation import predictions, report

    folders = [Path(folder) for folder in args.folders]
    output = Path(args.output) if args.output else folders[0] if len(folders) == 1 else None
    check_outputs(args, output)
    parts = [
        (str(folder), predictions.read_predictions(folder / predictions.FILE_NAME))
        for folder in folders
    ]
    runs = parts[0][1].runs
    if not runs or "name" not in runs[-1].get("suite", {}):
        raise predictions.PredictionsError(f"{folders[0]}: does not say which data set it is of")
    arguments = dict(runs[-1]["suite"])
    if args.files:
        arguments["paths"] = args.files
    suite = suite_of(arguments)
    check_export(args, suite)
    return deliver(args, report.Evaluation.of(suite, parts), output)


def deliver(args: argparse.Namespace, evaluation: "Evaluation", folder: Path | None) -> int:
    """Write the report and print it."""
    from llava_lite.evaluation import page, report

    content = report.report(evaluation)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        json_path, page_path = report.paths(folder)
        replace_json(json_path, content)
        replace_file(page_path, page.page(content).encode(errors="replace"))
    if args.report_file:
        replace_json(Path(args.report_file), content)
    part = evaluation.part
    if args.export and isinstance(part, Exporting):
        part.export(evaluation.answers, Path(args.export))
    print(json.dumps(content) if args.json else "\n".join(report.table(content)))
    return FAILED if content["samples"]["failed"] else OK


# ---- scenes --------------------------------------------------------------------------------------


def run_scenes(args: argparse.Namespace) -> int:
    """`llava-lite eval scenes`."""
    from llava_lite.evaluation.scenes.questions import PARAPHRASES
    from llava_lite.reduction import Reduction

    unknown = [name for name in args.families or () if name not in PARAPHRASES]
    if unknown:
        args.parser.error(f"no family {unknown[0]!r}; there are {', '.join(PARAPHRASES)}")
    reduction = Reduction.of(parse_reduction(args))
    from tqdm import tqdm

    from llava_lite.evaluation.scenes import accuracy
    from llava_lite.fast.quantize import method_of

    scenes = list(accuracy.fresh_scenes(args.n, args.seed, args.families))
    model = load_model(args)
    hidden = args.quiet or not sys.stderr.isatty()
    asked = sum(len(questions) for _, questions in scenes)
    with tqdm(unit="question", total=asked, file=sys.stderr, disable=hidden) as bar:
        tallies = accuracy.evaluate_scenes(
            model,
            scenes,
            reduction=reduction,
            batch_size=args.batch_size,
            draw=accuracy.RENDERERS[args.renderer],
            reuse_prefix=True,
            on_answer=bar.update,
        )
    method = method_of(model.llava)
    settings = {
        "model": model.config.name,
        "dtype": str(model.llava.dtype).removeprefix("torch."),
        **({"quantize": method} if method else {}),
        "reduction": str(reduction),
        "renderer": args.renderer,
        "scenes": args.n,
        "seed": args.seed,
    }
    if args.json:
        print(json.dumps(accuracy.report(tallies, settings, args.mistakes)))
    else:
        print(", ".join(f"{name} {value}" for name, value in settings.items()))
        print("\n".join(accuracy.table(tallies, args.mistakes)))
    return OK
