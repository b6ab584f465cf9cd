"""`llava-lite batch`: answer many prompts from a file, with resume."""

import argparse
from typing import TYPE_CHECKING, Any

from llava_lite.cli.arguments import (
    add_command,
    add_flags,
    add_model_arguments,
    add_notice_arguments,
    add_ray_arguments,
    add_sampling_arguments,
    parse_cluster,
    positive,
    shard,
)
from llava_lite.cli.console import FAILED, OK, say
from llava_lite.cli.progress import Progress
from llava_lite.cli.wanted import (
    default_source,
    generation_options,
    image_opener,
    load_model,
    load_options,
)
from llava_lite.generation import batch_file
from llava_lite.integrations import ray_batch

if TYPE_CHECKING:
    from llava_lite.generation.batch_file import Row, Summary

BATCH_HELP = """\
input:
  JSONL  one object a line: id (optional), image or images, prompt (or question, text)
  CSV    with a header naming the same fields
  folder every image in it, asked the one --prompt
  Image paths are relative to the folder of the input file. A row without an image is text only.

output: one JSON line per row, in order: id, prompt, image, answer or error, finish_reason, usage,
  and the reduction if one was asked for.
  A row that fails (bad image, prompt too long) gets an error line. All other rows are answered.
  To resume after a crash or Ctrl-C, run the same command with --resume.

exit code 0 means that every row is answered, 1 that some rows failed.

examples:
  llava-lite batch questions.jsonl -o answers.jsonl --resume
  llava-lite batch photos/ -o captions.jsonl -p "Describe the image." --batch-size 16"""


def add_batch(commands: Any) -> None:
    summary = "answer many prompts from a file"
    parser = add_command(commands, "batch", run_batch, "INPUT -o FILE", summary, BATCH_HELP)
    add = parser.add_argument
    add("input", metavar="INPUT", help="JSONL file, CSV file, or folder of images")
    add("-o", "--output", required=True, metavar="FILE", help="JSONL file to write")
    add("-p", "--prompt", metavar="TEXT", help="prompt of rows that have none")
    rows = parser.add_argument_group("rows")
    flags = {
        "--resume": "skip rows that FILE already holds",
        "--retry-errors": "with --resume: run failed rows again",
    }
    add_flags(rows, flags)
    text = "only every N-th row from the I-th on, I = 1..N, for N machines with an output each"
    rows.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help=text)
    size = batch_file.DEFAULT_BATCH_SIZE
    text = f"rows that run at once (default: {size})"
    rows.add_argument("--batch-size", type=positive, default=size, metavar="N", help=text)
    add_ray_arguments(parser)
    add_sampling_arguments(parser)
    add_notice_arguments(parser.add_argument_group("output"), stats=False)
    add_model_arguments(parser)


def run_batch(args: argparse.Namespace) -> int:
    """`llava-lite batch`."""
    if args.retry_errors and not args.resume:
        args.parser.error("--retry-errors needs --resume")
    cluster = parse_cluster(args)
    options = generation_options(args)
    rows = batch_file.select_shard(batch_file.read_rows(args.input, args.prompt), args.shard)
    resume = {"resume": args.resume, "retry_errors": args.retry_errors}
    reduction = options["reduction"]
    # Before the model is loaded, so that problems show at once.
    plan = batch_file.plan(rows, args.output, **resume, reduction=reduction)
    if plan.todo:
        summary = run_rows(args, rows, len(plan.todo), cluster, {**resume, **options})
    else:
        summary = batch_file.Summary(failed=plan.failed, present=plan.answered)
    if not args.quiet:
        say(format_summary(summary, args.output))
    return FAILED if summary.failed else OK


def run_rows(
    args: argparse.Namespace,
    rows: "list[Row]",
    total: int,
    cluster: "ray_batch.Cluster | None",
    options: dict[str, Any],
) -> "Summary":
    """Answer the rows with a progress bar. `total`: rows left to do."""
    options = {**options, "batch_size": args.batch_size}
    model = None if cluster else load_model(args)
    try:
        with Progress("row", args.quiet) as progress:
            progress.start(total)
            options["on_record"] = progress.count
            if cluster:
                source = ray_batch.ModelSource(default_source(args.model), load_options(args))
                return ray_batch.run_batch(rows, args.output, source, cluster, **options)
            assert model is not None
            return batch_file.run_batch(
                model, rows, args.output, open_image=image_opener(args), **options
            )
    except KeyboardInterrupt:
        if not args.quiet:
            say(f"{args.output} keeps all answers so far; resume with --resume")
        raise


def format_summary(summary: "Summary", output: str) -> str:
    """Counts in one line; with failed rows also the first error and how to run them again."""
    parts = [f"{summary.answered} answered", f"{summary.failed} failed"]
    if summary.present:
        parts.insert(0, f"{summary.present} were there")
    text = f"{output}: {', '.join(parts)}"
    if summary.first_error:
        first = summary.first_error
        text += f"\nfirst to fail: {first['id']!r}: {first['error']}"
    return text + ("\n(--resume --retry-errors runs them again)" if summary.failed else "")
