"""What figures need from a run: arrays, with NaN for what was not measured, phases and notes."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ib_callback.common import json_lines
from ib_callback.plot.sheet import Note
from ib_callback.results.measurement import Measurement, settings_differences
from ib_callback.results.phases import DEFAULT_RULE, Phase, Phases, find_phases, is_trained
from ib_callback.results.trajectory import Trajectory

# Up to this number of points, each one is joined to its null.
FEW_POINTS = 16
# Above this number, points become an image in vector files too, which would otherwise have several megabytes.
RASTERISED_ABOVE = 500
# If steps span more than this factor, colours follow their logarithm.
_LOGARITHMIC_SPAN = 50
_LONGEST_DIFFERENCE = 160
_TRAINER_STATE = "trainer_state.json"
# Settings that do not move points in the plane.
_OF_FEATURES = ("features", "feature_probes", "label_names")
# Settings in which two models may differ and still be compared in one plane.
_OF_THE_MODEL = ("layers", "dtype", "version", *_OF_FEATURES, "orders")


def given(measurements: Measurement | Iterable[Measurement]) -> list[Measurement]:
    """The points of a trajectory or of other measurements, as a list.

    Raises:
        ValueError: none of them was measured.
        TypeError: something is not a measurement.
    """
    points = [measurements] if isinstance(measurements, Measurement) else list(measurements)
    for point in points:
        if not isinstance(point, Measurement):
            raise TypeError(f"expected measurements, as a Trajectory has them, got {type(point).__name__}")
    if not any(point.orders for point in points):
        raise ValueError(f"expected at least one measured point to draw, got none among {len(points)} points")
    return points


def placed(points: Sequence[Measurement]) -> tuple[list[Measurement], list[Note]]:
    """The points that have a place in the order of training, and a note about the others.

    A point without a step, such as a final model beside its checkpoints, has no place if two other points have steps.
    """
    without = [point for point in points if point.step is None]
    if not without or sum(bool(point.orders) for point in points if point.step is not None) < 2:
        return [*points], []
    many = f"{len(without)} points have" if len(without) > 1 else "1 point has"
    note = Note(f"Not drawn: {many} no step, so the place among the others is unknown.")
    return [point for point in points if point.step is not None], [note]


def orders_of(points: Sequence[Measurement], asked: Sequence[str] | None) -> list[str]:
    """The orders to draw: the requested ones, by default all that were measured, the primary one first.

    Raises:
        ValueError: an order was not measured, or no order is requested.
    """
    known = list(dict.fromkeys(order for point in points for order in point.orders))
    if asked is None:
        first = primary_of(points)
        return sorted(known, key=lambda order: order != first)
    asked = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked))
    if not asked or not set(asked) <= set(known):
        raise ValueError(f"expected orders among {', '.join(known)}, got {', '.join(asked) or 'none'}")
    return asked


def primary_of(points: Sequence[Measurement]) -> str:
    """The primary order of the first measured point."""
    measured = next(point for point in points if point.orders)
    return measured.primary or next(iter(measured.orders))


def column(points: Sequence[Measurement], order: str, name: str) -> np.ndarray:
    """One number of every point, [points]. It is NaN where it is undefined, missing or unknown to this version.

    The order may be the order of a view, such as "readout/token".
    """
    numbers = [getattr(point[order], name, None) if order in point else None for point in points]
    return np.array(numbers, dtype=float)


def plane(points: Sequence[Measurement], order: str, suffix: str = "") -> np.ndarray:
    """Complexity and expressivity of every point, or their `…_null` or `…_se`, [points, 2]; NaN as in `column`."""
    return np.stack([column(points, order, f"{name}{suffix}") for name in ("complexity", "expressivity")], axis=1)


def unit(points: Iterable[Measurement]) -> str:
    """The unit of all information: a fraction of so many bits, if the number of bins is known.

    >>> unit([])
    '(fraction of log num_bins)'
    """
    number = _bins_of(points)
    return "(fraction of log num_bins)" if number is None else f"(fraction of log₂ {number:,} = {_bits(number)})"


def short_unit(points: Iterable[Measurement]) -> str:
    """The same for an axis without room: "(fraction of 6.64 bits)"."""
    number = _bins_of(points)
    return "(fraction of log num_bins)" if number is None else f"(fraction of {_bits(number)})"


def _bins_of(points: Iterable[Measurement]) -> int | None:
    """The number of bins, if all points have the same."""
    bins = {point.settings.get("num_bins") for point in points if point.orders}
    number = bins.pop() if len(bins) == 1 else None
    return number if isinstance(number, int) and number >= 2 else None


def _bits(number: int) -> str:
    return f"{math.log2(number):.2f} bits"


def learning_rates_beside(directory: Path) -> dict[int, float]:
    """Learning rates by step from `trainer_state.json`, which transformers writes; {} if they are not known.

    The file is searched in the directory and in its checkpoints. The newest one that has rates is read, because each
    one repeats the history of those before. Files that cannot be read are passed over.
    """
    try:
        folders = sorted(directory.glob("checkpoint-*"), key=_number_of, reverse=True)
    except OSError:
        folders = []
    for folder in (directory, *folders):
        if rates := _rates_in(folder / _TRAINER_STATE):
            return rates
    return {}


def _number_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _rates_in(path: Path) -> dict[int, float]:
    try:
        state = json_lines.parsed(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    history = state.get("log_history") if isinstance(state, dict) else None
    rates = {}
    for entry in history if isinstance(history, list) else ():
        step, rate = (entry.get("step"), entry.get("learning_rate")) if isinstance(entry, dict) else (None, None)
        if type(step) is int and isinstance(rate, int | float) and math.isfinite(rate):
            rates[step] = float(rate)
    return dict(sorted(rates.items()))


def start_label(points: Iterable[Measurement]) -> str:
    """What the model of step 0 is, according to its loss: "untrained", "pretrained", or "" if that is not known."""
    first = next((point for point in points if point.step == 0 and point.orders), None)
    if first is None or first.predictive_information is None:
        return ""
    return "pretrained" if is_trained(first) else "untrained"


def numbered(points: Sequence[Measurement], x: str = "step") -> tuple[np.ndarray, str]:
    """The step of every point, [points], and the name of the axis. If a step is unknown, points are counted from 1.

    Args:
        points: the points of a run.
        x: "step", or "tokens" for the training tokens seen so far.

    Raises:
        ValueError: `x` is "tokens" and the tokens of a point are not known, or `x` is something else.
    """
    if x not in ("step", "tokens"):
        raise ValueError(f'x: expected "step" or "tokens", got {x!r}')
    if x == "tokens":
        unknown = [point for point in points if point.tokens_seen is None and point.step != 0]
        if unknown:
            raise ValueError(
                f"x: expected points whose tokens are known, got {len(unknown)} of {len(points)} without. Draw over "
                "steps, or measure again: with tokens_per_step= of the callback, or with --tokens-per-step and a new "
                "-o of ib-callback measure"
            )
        return np.array([point.tokens_seen or 0 for point in points], dtype=float), "training tokens"
    steps = [point.step for point in points if point.step is not None]
    if len(steps) < len(points):
        return np.arange(1.0, len(points) + 1), "measurement"
    return np.array(steps, dtype=float), "training step"


def count_label(number: float, what: str) -> str:
    """A number of steps in full, or a number of tokens in thousands, millions, …; `what` comes from `numbered`.

    >>> count_label(143_000, "training step"), count_label(4.5e9, "training tokens"), count_label(0, "training tokens")
    ('143,000', '4.5B', '0')
    """
    if "tokens" not in what:
        return f"{number:,.0f}"
    power = min(int(math.log10(number)) // 3, 4) if number >= 1 else 0
    return f"{number / 1000**power:.4g}{['', 'K', 'M', 'B', 'T'][power]}"


def phases_of(measurements: object, points: Sequence[Measurement]) -> Phases | None:
    """The phases of a run, by its own rule if it is a trajectory.

    None if there is a single point, a step is missing, steps do not increase, or the run started from trained weights.
    """
    rule = measurements.rule if isinstance(measurements, Trajectory) else DEFAULT_RULE
    steps = [point.step for point in points if point.step is not None]
    if len(steps) < len(points) or len(points) < 2 or any(b <= a for a, b in itertools.pairwise(steps)):
        return None
    with warnings.catch_warnings():
        # The picture shows that there is no null.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = find_phases(points, rule)
    return None if found.trained else found


def phase_labels(phases: Phases) -> dict[Phase, str]:
    """The phases that occur, with the step at which each begins."""
    since = {
        Phase.FITTING: phases.fit_start,
        Phase.COMPRESSION: phases.compression_start,
        Phase.MEMORISING: phases.memorising_start,
    }
    labels = {}
    for phase in sorted({phase for phase in phases.phases if phase is not None}):
        step = since.get(phase)
        labels[phase] = f"{phase.name.lower()} phase" + ("" if step is None else f", from step {step:,}")
    return labels


def phases_sentence(phases: Phases) -> str:
    """When the phases of a run begin, in words."""
    begins = {
        "fitting": phases.fit_start,
        "compression": phases.compression_start,
        "memorising": phases.memorising_start,
    }
    where = "" if phases.plane is None else f" ({phases.plane.replace('_', ' ')} plane)"
    told = [f"{name} from step {step:,}" for name, step in begins.items() if step is not None]
    if phases.compression_start is None:
        told.append("no compression seen")
    return ", ".join(told) + where + "."


def notes_of_run(points: Sequence[Measurement]) -> list[Note]:
    """Notes about the points of a run."""
    return [*_changed_settings(points), *_missing(points)]


def _missing(points: Sequence[Measurement]) -> list[Note]:
    """A note that says how many points could not be measured."""
    missing = [point for point in points if not point.orders]
    if not missing:
        return []
    steps = [f"{point.step:,}" for point in missing if point.step is not None]
    where = f" (step{'s' if len(steps) > 1 else ''} {', '.join(steps)})" if 0 < len(steps) <= 6 else ""
    return [Note(f"Not drawn: {len(missing):,} of {len(points):,} points could not be measured{where}.")]


def _changed_settings(points: Sequence[Measurement]) -> list[Note]:
    """A note if the settings changed along a run, which `mix_settings=True` permits."""
    measured = [point for point in points if point.orders]
    for before, after in itertools.pairwise(measured):
        found = [] if before.settings == after.settings else settings_differences(before, after)
        if found := [text for text in found if not text.startswith(_OF_FEATURES)]:
            where = "" if after.step is None else f" at step {after.step:,}"
            return [Note(f"Not all points can be compared: the settings changed{where}: {_some(found)}", alarm=True)]
    return []


def comparison_notes(runs: dict[str, list[Measurement]]) -> list[Note]:
    """Notes about settings in which runs differ: those that make numbers incomparable, and those of the models."""
    settings = {name: next(p for p in reversed(points) if p.orders).settings for name, points in runs.items()}
    first, *others = settings
    notes, differing = [], set()
    for other in others:
        found = settings_differences(settings[first], settings[other])
        differing |= {re.split(r"[:.[]", text)[0] for text in found}
        if hard := [text for text in found if not text.startswith(_OF_THE_MODEL)]:
            notes.append(Note(f"Not comparable: {first} and {other} differ in {_some(hard)}", alarm=True))
    keys = [key for key in _OF_THE_MODEL if key in differing]
    if keys:
        notes.append(Note(f"The runs differ in {', '.join(keys)}."))
    return notes


def _some(differences: Sequence[str]) -> str:
    # The first eight characters of a fingerprint are enough to tell it from another one.
    text = re.sub(r'"([0-9a-f]{8})[0-9a-f]{24,}[…"]*', r"\1…", "; ".join(differences))
    return text if len(text) <= _LONGEST_DIFFERENCE else f"{text[: _LONGEST_DIFFERENCE - 1]}…"


def finite_range(*arrays: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest of all finite values; (0, 1) if there are none."""
    values = np.concatenate([np.asarray(array, dtype=float).ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)


def thinned(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` points, evenly spread; the first and the last point are always kept.

    >>> thinned(5, 3).tolist(), thinned(2, 3).tolist()
    ([0, 2, 4], [0, 1])
    """
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def spans_much(numbers: np.ndarray) -> bool:
    """Whether numbers span so large a factor that logarithms tell them apart better."""
    positive = numbers[numbers > 0]
    return len(positive) > 0 and bool(numbers.max() / positive.min() > _LOGARITHMIC_SPAN)


def crowds_at_the_start(numbers: np.ndarray) -> bool:
    """Whether most of the numbers lie in the first fifth of their range, as on a logarithmic schedule.

    >>> crowds_at_the_start(np.arange(0.0, 100_000.0, 500.0)), crowds_at_the_start(np.array([0.0, 1.0, 2.0, 5.0, 60.0]))
    (False, True)
    """
    positive = numbers[numbers > 0]
    return len(positive) > 1 and bool(np.median(positive) < 0.2 * positive.max())


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from 1 or `low` up to `high`, without `high`."""
    return [10.0**k for k in range(math.ceil(math.log10(max(high, 1.0)))) if 10.0**k >= low]
