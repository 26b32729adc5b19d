"""What names of checkpoints say, and which of many to take."""

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
# Of post-training, at the end of the name of a repository.
_POST = re.compile(r"[-_](sft|dpo|rlvr\d*|ppo|instruct|chat|it|base)$", re.I)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Said:
    """What the name of a checkpoint says; None where it does not.

    Attributes:
        step: optimizer steps.
        tokens: that were trained on, rounded as the name says them: OLMo 2's "step150-tokens1B" are .63 billion.
        stage: of the training.
    """

    step: int | None = None
    tokens: int | None = None
    stage: str | None = None


def said_by(name: str) -> Said:
    """What a branch, a file or a folder is called after.

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
    """The post-training that a repository's name ends with.

    >>> stage_of_repository("allenai/OLMo-2-1124-7B-DPO"), stage_of_repository("allenai/OLMo-2-1124-7B")
    ('dpo', None)
    """
    found = _POST.search(name)
    return None if found is None else found[1].lower()


def thinned(steps: Iterable[int], most: int | None) -> set[int]:
    """At most so many of the steps, evenly spread over their logarithms; the first and the last always.

    Step 0 has no logarithm and is kept besides the first one after it.

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
    # Where targets fell on one step, gaps that are widest are filled.
    while len(kept) < most:
        free = [step for step in positive if step not in kept]
        kept.add(max(free, key=lambda step: min(abs(math.log(step) - math.log(k)) for k in kept if k > 0)))
    return kept


def _geometric(first: int, last: int, number: int) -> Sequence[float]:
    low, high = math.log(first), math.log(last)
    return [low + (high - low) * i / max(number - 1, 1) for i in range(number)]
