"""`ib-callback log`: finished runs and measured models into Weights & Biases, or TensorBoard."""

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
        help="finished runs and models into Weights & Biases or TensorBoard",
        description="Log a run that is over, or measured models, to Weights & Biases or TensorBoard: every number "
        "under the name that a callback logs it by. Trackers refuse to write to past steps, so that the points lie on "
        "an axis of their own, ib/step. What is there already is not logged again.",
        **examples(
            "ib-callback log RUN_DIR --wandb my-run-ib",
            "ib-callback log results.jsonl --wandb ENTITY/PROJECT/RUN_ID",
            "WANDB_MODE=offline ib-callback log results.jsonl --model pythia-14m --wandb pythia",
            "ib-callback log RUN_DIR OTHER_RUN_DIR --tensorboard runs/ib",
            more="Several runs or models have a run, or a folder, each: RUN-NAME in the group RUN, DIR/NAME. Of a run "
            "of W&B that was logged offline on another machine, or whose directory was removed before wandb sync, "
            "nobody here can know what it has: log to another one.",
        ),
    )
    add_run_arguments(parser)
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument(
        "--wandb", metavar="RUN",
        help="the id of a run, ID, PROJECT/ID or ENTITY/PROJECT/ID; it is resumed, or made if there is none",
    )  # fmt: skip
    to.add_argument("--tensorboard", metavar="DIR", help="where event files are written")
    parser.add_argument("--group", help="of runs of W&B, such as that of the live run")
    parser.add_argument("--no-plane", action="store_true", help="leave out the picture of the plane")
    parser.set_defaults(run=guarded(_log))


def _log(options: argparse.Namespace) -> int:
    if options.group is not None and options.wandb is None:
        raise ValueError("--group: is of use with --wandb alone. Leave it out")
    measured, status = courses_of(options)
    courses = [(course.name, course.trajectory) for course in measured]
    pictures = not options.no_plane
    if options.tensorboard is not None:
        results = to_tensorboard(courses, Path(options.tensorboard), pictures=pictures)
    else:
        *where, run_id = options.wandb.split("/")
        if len(where) > 2 or not all((*where, run_id)):
            raise ValueError(f"--wandb: expected ID, PROJECT/ID or ENTITY/PROJECT/ID, got {options.wandb!r}")
        entity, project = [None, None, *where][-2:]
        results = to_wandb(courses, run_id, project=project, entity=entity, group=options.group, pictures=pictures)
    for result in results:
        print(result)
        if result.without_step:
            status = NOT_ALL
    return status
