"""`ib-callback log`: log finished runs and measured models to Weights & Biases or TensorBoard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ib_callback.cli._command import NOT_ALL, add_run_arguments, courses_of, examples, guarded
from ib_callback.run.backfill import to_tensorboard, to_wandb


def add_log_command(commands: Any) -> None:
    """Add `log` to the parser of `ib-callback`."""
    parser = commands.add_parser(
        "log",
        help="log finished runs and measured models to Weights & Biases or TensorBoard",
        description="Log finished runs or measured models to Weights & Biases or TensorBoard. Each number has the same "
        'name as in a live run, such as ib/complexity, or code/complexity in a run with prefix="code/". Trackers '
        "refuse to write to past steps, so in W&B the points have their own axis, ib/step. Points that are already "
        "there are not logged again.",
        **examples(
            "ib-callback log RUN_DIR --wandb my-run-ib",
            "ib-callback log results.jsonl --wandb ENTITY/PROJECT/RUN_ID",
            "WANDB_MODE=offline ib-callback log results.jsonl --model pythia-14m --wandb pythia",
            "ib-callback log RUN_DIR OTHER_RUN_DIR --tensorboard runs/ib",
            more="With several runs or models, each gets its own W&B run, ID-NAME in the group ID, or its own folder, "
            "DIR/NAME. The command cannot know what a W&B run already has if it was logged offline on another machine, "
            "or if its directory was removed before wandb sync. Log to another run then.",
        ),
    )
    add_run_arguments(parser)
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument(
        "--wandb", metavar="ID",
        help="a W&B run, as ID, PROJECT/ID or ENTITY/PROJECT/ID; it is resumed, or created if it does not exist",
    )  # fmt: skip
    to.add_argument("--tensorboard", metavar="DIR", help="directory for the event files")
    parser.add_argument("--group", help="group of the W&B runs, such as the group of the live run")
    parser.add_argument("--no-plane", action="store_true", help="do not log the picture of the plane")
    parser.set_defaults(run=guarded(_log))


def _log(options: argparse.Namespace) -> int:
    if options.group is not None and options.wandb is None:
        raise ValueError("--group only works with --wandb. Add --wandb, or leave it out")
    measured, status = courses_of(options)
    courses = [(course.name, course.trajectory) for course in measured]
    prefixes = {course.name: course.prefix for course in measured}
    pictures = not options.no_plane
    if options.tensorboard is not None:
        results = to_tensorboard(courses, Path(options.tensorboard), pictures=pictures, prefixes=prefixes)
    else:
        *where, run_id = options.wandb.split("/")
        if len(where) > 2 or not all((*where, run_id)):
            raise ValueError(f"--wandb: expected ID, PROJECT/ID or ENTITY/PROJECT/ID, got {options.wandb!r}")
        entity, project = [None, None, *where][-2:]
        results = to_wandb(
            courses, run_id, project=project, entity=entity, group=options.group, pictures=pictures, prefixes=prefixes
        )
    for result in results:
        print(result)
        if result.without_step:
            status = NOT_ALL
    return status
