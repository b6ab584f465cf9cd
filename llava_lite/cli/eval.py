"""`llava-lite eval`: one command per data set, `scenes` for drawn images, `report` for a report of
existing answers.

Slow imports happen inside the functions.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_flags,
    add_model_arguments,
    add_ray_arguments,
    add_sampling_arguments,
    natural,
    parse_cluster,
    positive,
    shard,
)
from llava_lite.cli.console import FAILED, OK, WRONG_USAGE, say
from llava_lite.cli.eval_scenes import add_scenes
from llava_lite.cli.progress import Progress
from llava_lite.cli.wanted import default_source, generation_options, load_model, load_options
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
from llava_lite.saving import check_output, replace_file, replace_json

if TYPE_CHECKING:
    from llava_lite.evaluation.report import Evaluation
    from llava_lite.evaluation.runner import Ask
    from llava_lite.generation.sampling import GenerationOptions

EVAL_HELP = """\
examples:
  llava-lite eval mmbench MMBench_DEV_EN.tsv -o runs/mmbench -m weights/llava-1.5-7b
  llava-lite eval coco val2014/ captions_val2014.json -o runs/coco --limit 500
  llava-lite eval jsonl questions.jsonl -o runs/own --reduction folded-144-36
  llava-lite eval report runs/shard-*/ -o runs/all
  llava-lite eval --data-file coco_val_500.json --report-file report.json

`llava-lite eval WHAT --help` explains each."""

SUITE_HELP = """\
DIR gets predictions.jsonl (the settings, and one line per answer as soon as it is known),
report.json, and report.html, a page that needs no network. Prompts are the official ones. Answers
are greedy by default. A sample that fails (bad image, prompt too long) does not stop the others;
the exit code is then 1.

Photos are rotated as the camera noted (EXIF) unless --no-exif is given; LLaVA does not rotate them.
VizWiz's line about questions that cannot be answered is not added to the prompt. LLaVA's published
results of TextVQA need --ocr.

To resume after a crash or Ctrl-C, run the same command with --reuse. It refuses answers that were
given with other settings. Each of N machines writes its shard to a DIR of its own; `llava-lite eval
report DIR... -o DIR` makes one report of them. With --ray, models in several actors answer into one
DIR; --reuse resumes with or without it."""

REPORT_HELP = """\
The data set is opened at its old place; --files gives a new place. All answers must have been given
with the same settings.

examples:
  llava-lite eval report runs/mmbench
  llava-lite eval report runs/shard-1 runs/shard-2 -o runs/all"""

# How the options of data sets look as flags. All others take a text.
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


def add_eval(commands: Any) -> None:
    summary = "measure how often answers are right: MMBench, COCO, POPE, VQA, your own data"
    usage = "WHAT FILES -o DIR"
    parser = add_command(commands, "eval", lambda _: WRONG_USAGE, usage, summary, EVAL_HELP)
    commands = parser.add_subparsers(prog="llava-lite eval", metavar="WHAT [...]", required=True)
    add_scenes(commands)
    for name, kind in SUITES.items():
        add_data_set(commands, name, kind)
    add_report(commands)


def add_data_set(commands: Any, name: str, kind: SuiteKind) -> None:
    usage = f"{kind.usage} -o DIR"
    parser = add_command(commands, name, run_data_set, usage, kind.summary, SUITE_HELP, "eval")
    parser.set_defaults(suite=name)
    parser.add_argument("paths", metavar="PATH", nargs="+", help=f"in any order: {kind.usage}")
    for option, text in kind.options.items():
        flag = f"--{option.replace('_', '-')}"
        if option in SWITCHES:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        else:
            parser.add_argument(flag, choices=CHOICES.get(option), metavar="NAME", help=text)
    add_sample_arguments(parser.add_argument_group("samples"))
    add_ray_arguments(parser)
    add_sampling_arguments(parser, "what the data set asks for")
    add_output_arguments(parser.add_argument_group("output"))
    add_model_arguments(parser)


def add_sample_arguments(group: argparse._ArgumentGroup) -> None:
    """Which samples, and how many at once."""
    add = group.add_argument
    add("--limit", type=positive, metavar="N", help="only the first N")
    text = "only every N-th image from the I-th on, I = 1..N, for N machines with a DIR each"
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help=text)
    add("--batch-size", type=positive, metavar="N", help="asked at once (default: 8)")
    text = "threads that open images ahead of the model (default: 2; 0: none)"
    add("--workers", type=natural, default=2, metavar="N", help=text)


def add_output_arguments(group: argparse._ArgumentGroup) -> None:
    """Where the results go, and whether existing ones are reused or overwritten."""
    add = group.add_argument
    add("-o", "--output", metavar="DIR", help="folder of predictions and report")
    text = "write the JSON report there, too (without -o, DIR is FILE without its suffix)"
    add("--report-file", metavar="FILE", help=text)
    flags = {
        "--reuse": "resume with the predictions in DIR",
        "--retry-errors": "with --reuse: ask failed samples again",
        "--force": "overwrite the predictions in DIR",
    }
    add_flags(group, flags)
    text = "write the answers as the data set's server takes them"
    add("--export", metavar="FILE", help=text)
    flags = {
        "--json": "print the report, no table",
        "--quiet": "nothing on stderr but errors",
    }
    add_flags(group, flags)


def add_report(commands: Any) -> None:
    summary = "make the report of existing answers, of one or several shards"
    parser = add_command(commands, "report", run_report, "DIR...", summary, REPORT_HELP, "eval")
    add = parser.add_argument
    add("folders", nargs="+", metavar="DIR", help="folders that an evaluation wrote")
    text = "folder for the report (default: that one; of several, none)"
    add("-o", "--output", metavar="DIR", help=text)
    add("--report-file", metavar="FILE", help="write the JSON report there, too")
    add("--files", nargs="+", metavar="FILE", help="the data set's files, if they moved")
    add("--export", metavar="FILE", help="write the answers as the data set's server takes them")
    add("--json", action="store_true", help="print the report, no table")


def run_data_set(args: argparse.Namespace) -> int:
    """`llava-lite eval mmbench`, and so on."""
    folder = output_folder(args)
    cluster = parse_cluster(args)
    options = generation_options(args)
    reopen = suite_arguments(args)
    check_outputs(args, folder)
    suite = open_again(reopen)
    check_export(args, suite)
    options["max_new_tokens"] = options["max_new_tokens"] or suite.max_new_tokens
    from llava_lite.evaluation import predictions, report
    from llava_lite.evaluation.settings import answer_settings
    from llava_lite.generation.sampling import GenerationOptions

    checked = GenerationOptions(**options)
    settings = answer_settings(suite, checked)
    path = folder / predictions.FILE_NAME
    predictions.check(path, args.reuse, args.force, settings)
    ask = choose_ask(args, checked, cluster)
    answer(args, suite, ask, settings, folder, reopen)
    found = predictions.read_predictions(path)
    return deliver(args, report.Evaluation.of(suite, [(str(folder), found)]), folder)


def output_folder(args: argparse.Namespace) -> Path:
    """The folder of the predictions. Contradictory flags are wrong usage."""
    if args.retry_errors and not args.reuse:
        args.parser.error("--retry-errors needs --reuse")
    if args.reuse and args.force:
        args.parser.error("--reuse resumes with the predictions, --force overwrites them: give one")
    if args.output is None and args.report_file is None:
        args.parser.error("a folder for predictions and report is needed: -o DIR")
    if args.output is not None:
        return Path(args.output)
    folder = Path(args.report_file).with_suffix("")
    if folder == Path(args.report_file):
        args.parser.error("a folder for predictions is needed: -o DIR")
    return folder


def suite_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Name, paths and options of the suite as plain types, to open it now and for a report.

    A wrong number of paths is wrong usage."""
    paths = [Path(path).absolute() for path in args.paths]
    if all(path.exists() for path in paths):
        try:
            split_paths(args.suite, paths)
        except EvaluationError as error:
            args.parser.error(str(error))
    options = {name: getattr(args, name) for name in SUITES[args.suite].options}
    return {"name": args.suite, "paths": list(map(str, paths)), "options": options}


def open_again(arguments: Mapping[str, Any]) -> Suite:
    """Open the suite of `suite_arguments`."""
    paths = [Path(path) for path in arguments["paths"]]
    return open_suite(arguments["name"], paths, **arguments["options"])


def check_export(args: argparse.Namespace, suite: Suite) -> None:
    """--export is wrong usage if the data set has no format for answers."""
    if args.export and not isinstance(suite, Exporting):
        args.parser.error(f"--export: {suite.name} has no format for answers")


def check_outputs(args: argparse.Namespace, folder: Path | None) -> None:
    """Raise EvaluationError, before anything is asked, if a result cannot be written."""
    if folder is not None:
        first = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not first.is_dir():
            raise EvaluationError(f"{folder}: {first} is not a folder")
        if not os.access(first, os.W_OK):
            raise EvaluationError(f"{folder}: {first} cannot be written to")
    for name in (args.report_file, args.export):
        if name is None:
            continue
        path = Path(name)
        will_exist = folder is not None and path.absolute().parent == folder.absolute()
        if path.parent.exists() or not will_exist:
            check_output(path, EvaluationError)


def choose_ask(
    args: argparse.Namespace,
    options: "GenerationOptions",
    cluster: ray_batch.Cluster | None,
) -> "Ask":
    """The function that answers: actors of a cluster, or a model in this process."""
    name, wanted = default_source(args.model), load_options(args)
    if cluster is not None:
        from llava_lite.integrations.ray_eval import asking_actors

        source = ray_batch.ModelSource(name, wanted)
        return asking_actors(source, cluster, options, args.batch_size, args.workers)
    from llava_lite.evaluation.engine import Engine
    from llava_lite.evaluation.runner import ask_here
    from llava_lite.evaluation.settings import Origin, model_settings

    model = load_model(args)
    engine = Engine(model, options, args.batch_size, args.workers)
    return ask_here(engine, model_settings(model, Origin.of(name, wanted), options))


def answer(
    args: argparse.Namespace,
    suite: Suite,
    ask: "Ask",
    settings: Mapping[str, Any],
    folder: Path,
    reopen: Mapping[str, Any],
) -> None:
    """Ask the missing samples, with a progress bar."""
    from llava_lite.evaluation.runner import Files, Selection, run

    files = Files(folder, args.reuse, args.retry_errors, args.force)
    selection = Selection(args.limit, args.shard)
    try:
        with Progress("sample", args.quiet) as progress:
            run(
                suite.samples(),
                ask,
                files,
                settings,
                selection,
                reopen,
                on_start=progress.start,
                on_record=progress.count,
            )
    except KeyboardInterrupt:
        if not args.quiet:
            say(f"{folder} keeps all answers so far; resume with --reuse")
        raise


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
        raise predictions.PredictionsError(f"{folders[0]}: does not name its data set")
    arguments = dict(runs[-1]["suite"])
    if args.files:
        arguments["paths"] = args.files
    suite = open_again(arguments)
    check_export(args, suite)
    return deliver(args, report.Evaluation.of(suite, parts), output)


def deliver(args: argparse.Namespace, evaluation: "Evaluation", folder: Path | None) -> int:
    """Write the report and print it."""
    from llava_lite.evaluation import page, report

    content = report.report(evaluation)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / report.JSON_NAME, content)
        replace_file(folder / report.PAGE_NAME, page.page(content).encode(errors="replace"))
    if args.report_file:
        replace_json(Path(args.report_file), content)
    part = evaluation.part
    if args.export and isinstance(part, Exporting):
        part.export(evaluation.answers, Path(args.export))
    print(json.dumps(content) if args.json else "\n".join(report.table(content)))
    return FAILED if content["samples"]["failed"] else OK
