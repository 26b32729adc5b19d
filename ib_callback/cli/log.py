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
        help="finished runs and models into Weights & Biases or TensorBoard",
        description="Log a run that is over, or measured models, to Weights & Biases or TensorBoard: every number "
        "under the name that a callback uses. Trackers refuse to write to past steps, so the points have an axis of "
        "their own, ib/step. Points that are there already are not logged again.",
        **examples(
            "ib-callback log RUN_DIR --wandb my-run-ib",
            "ib-callback log results.jsonl --wandb ENTITY/PROJECT/RUN_ID",
            "WANDB_MODE=offline ib-callback log results.jsonl --model pythia-14m --wandb pythia",
            "ib-callback log RUN_DIR OTHER_RUN_DIR --tensorboard runs/ib",
            more="Each of several runs or models gets a run of its own, RUN-NAME in the group RUN, or a folder, "
            "DIR/NAME. What a run of W&B has is not known here if it was logged offline on another machine, or if its "
            "directory was removed before wandb sync: log to another run then.",
        ),
    )
    add_run_arguments(parser)
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument(
        "--wandb", metavar="RUN",
        help="the id of a run, ID, PROJECT/ID or ENTITY/PROJECT/ID; it is resumed, or made if it does not exist",
    )  # fmt: skip
    to.add_argument("--tensorboard", metavar="DIR", help="where event files are written")
    parser.add_argument("--group", help="of runs of W&B, such as that of the live run")
    parser.add_argument("--no-plane", action="store_true", help="leave out the picture of the plane")
    parser.set_defaults(run=guarded(_log))


def _log(options: argparse.Namespace) -> int:
    if options.group is not None and options.wandb is None:
        raise ValueError("--group: expected only together with --wandb. Leave it out, or add --wandb")
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
