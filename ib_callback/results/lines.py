"""Lines of trajectory files and of files of results. Each is a measurement; in a file of results it names its model."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ib_callback.common import json_lines
from ib_callback.common.errors import TrajectoryError
from ib_callback.common.messages import warn
from ib_callback.results.measurement import Measurement, incomparable_settings

_SEAL = re.compile(rb', "crc32": "([^"]*)"}\s*$')
# Settings in which checkpoints of one model may differ and still form one course; the trajectory then warns.
_OF_THE_MODEL = ("dtype", "layers", "loss")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model and checkpoint of a measurement.

    Attributes:
        model: name of the model. Measurements with the same name form one course: the checkpoints of one training.
        revision: the checkpoint: a branch, tag or commit on the hub, or the name of a file or folder.
        family: name of a family of models, such as "olmo2".
        stage: stage of the training, such as "stage1" or "dpo". Each stage counts its steps from the beginning.
        num_parameters: number of parameters of the model; shared ones count once.
        tokens: number of tokens that the training had seen by then.
        source: what was loaded, as a path or as `repository@commit`.
        request: a digest of the probe and of all requested settings.
    """

    model: str
    revision: str | None = None
    family: str | None = None
    stage: str | None = None
    num_parameters: int | None = None
    tokens: int | None = None
    source: str | None = None
    request: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin | None:
        """The origin in a line of results; None for a line of a trajectory, which names no model.

        Raises:
            ValueError: a value is invalid; the message names it.
        """
        if data.get("model") is None:
            return None
        for name, value in data.items():
            wanted = int if name in ("num_parameters", "tokens") else str
            if name in _ORIGIN and value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
                raise ValueError(f"{name} must be {'an integer' if wanted is int else 'a text'} or None, got {value!r}")
        return cls(**{name: data[name] for name in _ORIGIN if name in data})


_ORIGIN = tuple(field.name for field in fields(Origin))
# The origin is None in a trajectory file.
Row = tuple[Origin | None, Measurement]


def to_line(measurement: Measurement, origin: Origin | None = None) -> bytes:
    """A measurement as one line of JSON, including its line break. The last entry is a checksum of all before it."""
    data = ({} if origin is None else asdict(origin)) | measurement.to_dict()
    content = json.dumps(data, allow_nan=False).encode()
    return content[:-1] + b', "crc32": "%s"}\n' % checksum(content)


def checksum(content: bytes) -> bytes:
    """A checksum of eight hex digits."""
    return b"%08x" % zlib.crc32(content)


def _check_line(line: bytes) -> None:
    """Raise a ValueError if a line was changed. Lines without a checksum come from an earlier version and pass."""
    seal = _SEAL.search(line)
    if seal is not None and seal[1] != checksum(line[: seal.start()] + b"}"):
        raise ValueError(
            'its checksum does not match its content. If you changed the line on purpose, remove its entry "crc32"'
        )


def parse_lines(data: bytes, path: Path, check: Callable[[Measurement], None]) -> list[tuple[bytes, Measurement]]:
    """Every line with its measurement; an incomplete last line is left out with a warning.

    Args:
        data: content of the file.
        path: path of the file, for messages.
        check: called with each measurement in turn; raises a ValueError if it cannot follow the others.

    Raises:
        TrajectoryError: a line is damaged that is not the last one; the message names it.
    """
    return [(line, measurement) for line, _, measurement in _parsed(data, path, check)]


def read_rows(path: Path, check: Callable[[Measurement], None] = lambda _: None) -> list[Row]:
    """Every line of a file; an incomplete last line is left out with a warning.

    Args:
        path: path of the file.
        check: as for `parse_lines`, for lines that name no model.

    Raises:
        TrajectoryError: the file or one of its lines cannot be read; the message names it.
    """
    with json_lines.explained(path, "read"):
        data = path.read_bytes()
    return [(origin, measurement) for _, origin, measurement in _parsed(data, path, check)]


def _parsed(
    data: bytes, path: Path, check: Callable[[Measurement], None]
) -> list[tuple[bytes, Origin | None, Measurement]]:
    found = []
    for number, line in json_lines.intact_lines(data, path):
        try:
            _check_line(line)
            values = json_lines.parsed(line)
            measurement = Measurement.from_dict(values)
            origin = Origin.from_dict(values)
            if origin is None:
                check(measurement)
        except ValueError as error:
            raise TrajectoryError(
                f"{path}:{number}: {error}. Correct or remove that line, or move the file away"
            ) from error
        found.append((line, origin, measurement))
    return found


def is_measured(path: Path) -> bool:
    """Whether a file begins with a line of a trajectory or of results.

    Raises:
        OSError: the file cannot be read.
    """
    first = _first_line(path)
    return first.startswith(b"{") and (b'"crc32"' in first or b'"orders"' in first)


def names_a_model(path: Path) -> bool:
    """Whether a file begins with a line of results.

    Raises:
        OSError: the file cannot be read.
    """
    return is_measured(path) and _first_line(path).startswith(b'{"model": "')


def _first_line(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.readline()


def courses_of(rows: Iterable[Row], path: object) -> dict[str, list[tuple[Origin, Measurement]]]:
    """Courses by model: the measurements of each model, sorted by step; those without a step come last.

    If a model was trained in several stages, each stage is a course, because each counts its steps from the beginning.
    Measurements with settings that cannot be compared form separate courses, which are numbered from the second on. If
    a checkpoint was measured several times with the same settings, the last success counts; without a success, a
    failure counts. The tokens of an origin are those of its measurement.

    Args:
        rows: rows of one or several files.
        path: the path, for messages.

    Raises:
        TrajectoryError: a line names no model.

    Warns:
        RuntimeWarning: a model was measured with settings that cannot be compared, or two checkpoints have the same
            step.
    """
    stages: dict[str, dict[str | None, list[tuple[Origin, Measurement]]]] = {}
    for origin, measurement in rows:
        if origin is None:
            raise TrajectoryError(f"{path}: expected every line to name a model, but some lines name none")
        if measurement.tokens_seen is None and origin.tokens is not None:
            measurement = replace(measurement, tokens_seen=origin.tokens)
        stages.setdefault(origin.model, {}).setdefault(origin.stage, []).append((origin, measurement))
    courses = {}
    for model, by_stage in stages.items():
        for stage, entries in by_stage.items():
            name = f"{model} {stage}" if stage is not None and len(by_stage) > 1 else model
            for number, (course, why) in enumerate(_comparable(entries), start=1):
                key = name if number == 1 else f"{name} ({number})"
                if number > 1:
                    warn(
                        f"{path}: {name} was measured with different settings, so not all its points can be compared. "
                        f"Points with other settings form a separate trajectory, {key!r}. They differ from the first "
                        f"points in {why}."
                    )
                courses[key] = _in_order(course, key)
    return courses


def _comparable(
    entries: Iterable[tuple[Origin, Measurement]],
) -> list[tuple[list[tuple[Origin, Measurement]], str]]:
    """Groups whose settings can be compared, each with its differences from the first; failures are in the first."""
    groups: list[tuple[list[tuple[Origin, Measurement]], str]] = []
    failed = []
    for entry in entries:
        if entry[1].error is not None:
            failed.append(entry)
            continue
        found = [incomparable_settings(group[0][1], entry[1]) for group, _ in groups]
        fitting = [group for (group, _), differences in zip(groups, found, strict=True) if not differences] or [
            group
            for (group, _), differences in zip(groups, found, strict=True)
            if all(re.split(r"[./]", name)[0] in _OF_THE_MODEL for name in differences)
            # The same checkpoint in another precision, or at other layers, must not replace the first measurement.
            and _key(*entry) not in {_key(*other) for other in group}
        ]
        if fitting:
            fitting[0].append(entry)
        else:
            groups.append(([entry], "; ".join(found[0].values()) if found else ""))
    measured = {_key(*entry) for group, _ in groups for entry in group}
    failed = [entry for entry in failed if _key(*entry) not in measured]
    if not groups:
        return [(failed, "")]
    groups[0][0].extend(failed)
    return groups


def _key(origin: Origin, measurement: Measurement) -> object:
    """A key that identifies a checkpoint; points of a trajectory without a step are all different."""
    known = (origin.revision, measurement.step)
    return known if origin.request is not None or known != (None, None) else id(measurement)


def _in_order(course: Iterable[tuple[Origin, Measurement]], name: str) -> list[tuple[Origin, Measurement]]:
    last = {_key(origin, m): (origin, m) for origin, m in course}
    by_step: dict[int, tuple[Origin, Measurement]] = {}
    without = []
    for entry in last.values():
        revision, step = entry[0].revision, entry[1].step
        if step is None:
            without.append(entry)
        elif step not in by_step or by_step[step][1].error is not None:
            by_step[step] = entry
        elif entry[1].error is None:
            warn(
                f"{name} has two checkpoints of step {step:,}, {by_step[step][0].revision} and {revision}. The second "
                "one is left out."
            )
    return [*(by_step[step] for step in sorted(by_step)), *without]
