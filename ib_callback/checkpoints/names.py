"""Read steps, tokens and stages from the names of checkpoints, and choose some of many."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# "step1000", "step=500", "global_step_20", "checkpoint-300", "iter-010000" and "steps-7"; not "step1B".
_STEP = re.compile(
    r"(?:^|[^a-z])(?:global_?step|steps?|checkpoint|iter(?:ation)?|ckpt)[-_=]?(\d+)(?![\d.]*[KMBT])", re.I
)
_TOKENS = re.compile(r"(?:^|[^a-z])tokens?[-_=]?(\d+(?:\.\d+)?)([KMBT]?)(?![a-z\d])", re.I)
_STAGE = re.compile(r"^(stage\d+(?:-ingredient\d+)?)(?:-|$)", re.I)
# A stage of post-training, at the end of the name of a repository.
_POST = re.compile(r"[-_](sft|dpo|rlvr\d*|ppo|instruct|chat|it|base)$", re.I)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Said:
    """The facts in the name of a checkpoint; None for those that the name does not contain.

    Attributes:
        step: number of optimizer steps.
        tokens: number of training tokens, rounded as in the name: OLMo 2's "step150-tokens1B" stands for .63 billion.
        stage: stage of the training.
    """

    step: int | None = None
    tokens: int | None = None
    stage: str | None = None


def said_by(name: str) -> Said:
    """Read the facts in the name of a branch, a file or a folder.

    >>> said_by("stage1-step1000-tokens5B")
    Said(step=1000, tokens=5000000000, stage='stage1')
    >>> said_by("step143000"), said_by("main")
    (Said(step=143000, tokens=None, stage=None), Said(step=None, tokens=None, stage=None))
    """
    step, tokens, stage = _STEP.search(name), _TOKENS.search(name), _STAGE.search(name)
    return Said(
        step=None if step is None else int(step[1]),
        tokens=None if tokens is None else round(float(tokens[1]) * _UNITS[tokens[2].upper()]),
        stage=None if stage is None else stage[1].lower(),
    )


def stage_of_repository(name: str) -> str | None:
    """The stage of post-training at the end of a repository's name.

    >>> stage_of_repository("allenai/OLMo-2-1124-7B-DPO"), stage_of_repository("allenai/OLMo-2-1124-7B")
    ('dpo', None)
    """
    found = _POST.search(name)
    return None if found is None else found[1].lower()


def thinned(steps: Iterable[int], most: int | None) -> set[int]:
    """Choose at most `most` of the steps, evenly spread over their logarithms; the first and the last are always kept.

    Step 0 has no logarithm. It is kept in addition to the first step after it.

    >>> sorted(thinned(range(0, 1001), 5))
    [0, 1, 10, 100, 1000]
    >>> sorted(thinned([10, 20], None))
    [10, 20]
    """
    known = sorted(set(steps))
    if most is None or len(known) <= most:
        return set(known)
    if most == 1:
        return {known[-1]}
    kept = {known[0], known[-1]}
    positive = [step for step in known if step > 0]
    inner = most - (known[0] == 0)
    for target in _geometric(positive[0], positive[-1], inner):
        if len(kept) == most:
            break
        free = [step for step in positive if step not in kept or step in (positive[0], positive[-1])]
        kept.add(min(free, key=lambda step: abs(math.log(step) - target)))
    # If several targets fell on one step, the widest gaps are filled.
    while len(kept) < most:
        free = [step for step in positive if step not in kept]
        kept.add(max(free, key=lambda step: min(abs(math.log(step) - math.log(k)) for k in kept if k > 0)))
    return kept


def _geometric(first: int, last: int, number: int) -> Sequence[float]:
    low, high = math.log(first), math.log(last)
    return [low + (high - low) * i / max(number - 1, 1) for i in range(number)]
