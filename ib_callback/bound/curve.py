"""The Information Bottleneck curve of a discrete joint distribution p(x, y): how much a code can say about Y.

A code T of X that keeps complexity I(X;T) has an expressivity I(Y;T) of at most the curve of the joint (Tishby,
Pereira & Bialek 1999). The iteration that finds codes may end in local maxima, so that what is found is *achievable*: a
curve from inside, at or below the true bound. No code of X alone lies above min(I(X;T), I(X;Y)), by the data
processing inequality: the two bracket the true bound.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ib_callback.bound._anneal import MANY_ROWS, Effort, anneal, envelope
from ib_callback.bound._joint import Joint
from ib_callback.common import json_lines
from ib_callback.common.checks import check_integer
from ib_callback.common.files import expanded, write_atomically
from ib_callback.common.messages import describe
from ib_callback.common.progress import progress_bar

FORMAT = 2
_CHECKSUM = "sha256"  # of all that comes before it in the file; format 1 had none
_OF_FILE = {
    "format", "unit", "complexity", "expressivity", "betas", "mutual_information", "num_codewords", _CHECKSUM,
}  # fmt: skip
# Beside the trajectory of a run of which it is the bound.
FILENAME = "ib_curve.json"


@dataclass(frozen=True, eq=False, repr=False)
class IBCurve:
    """Achievable complexity and expressivity: a concave curve from (0, 0) on, of which these are the corners.

    It is a lower bound on what codes of X can reach, hence on the true bound, and rounding apart it lies at or below
    min(complexity, `mutual_information`), an upper bound on it. Between corners it is reached by time-sharing: the
    one code for a share of the positions and the other for the rest, which may take twice `num_codewords`.

    Hidden states of a language model see more of the text than X, the token: their point may lie above this curve,
    and above the diagonal. That excess is information from the wider context, not an error.

    Attributes:
        complexity: I(X;T) of each corner, ascending from 0.0, [k], float64.
        expressivity: I(Y;T) of each corner, ascending from 0.0, [k], float64.
        betas: weight β of the expressivity in the objective I(Y;T) − I(X;T)/β with which the corner was found, [k]: 0
            at the origin, infinite for a code that is hard (a partition of X).
        mutual_information: I(X;Y), which no expressivity exceeds.
        num_codewords: how many values T could take.
        unit: of all of these but `betas`: "nats", "bits" or "efficiency", a fraction of log(number of bins).
        nats_per_unit: of that unit.
        info: what else a file says about the curve, as JSON values: for `probe_curve` the probe's fingerprint, the
            order and the number of positions.
    """

    complexity: np.ndarray
    expressivity: np.ndarray
    betas: np.ndarray
    _: KW_ONLY
    mutual_information: float
    num_codewords: int
    info: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "nats"
    nats_per_unit: float = 1.0

    def __post_init__(self) -> None:
        for name in ("complexity", "expressivity", "betas"):
            array = np.array(getattr(self, name), np.float64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        c, e, b = self.complexity, self.expressivity, self.betas
        alike = c.ndim == 1 and len(c) > 0 and c.shape == e.shape == b.shape
        ascends = alike and c[0] == e[0] == 0 and (np.diff(c) > 0).all() and (np.diff(e) >= 0).all()
        if not ascends or not np.isfinite([c[-1], e[-1], self.mutual_information]).all() or np.isnan(b).any():
            raise ValueError(
                "corners: expected finite values that ascend from (0, 0), as many complexities as expressivities and "
                f"betas, got shapes {c.shape}, {e.shape} and {b.shape}"
            )
        taken = sorted(_OF_FILE & self.info.keys())
        if taken:
            raise ValueError(
                f"info: expected names that the file of a curve does not use itself, got {', '.join(taken)}"
            )

    def bound(self, complexity: Any) -> Any:
        """The highest expressivity that was achieved with at most this complexity.

        Linear between corners; 0 for a complexity below 0, which rounding yields; beyond the last corner the
        expressivity of that one, the largest that so many codewords achieved.

        Args:
            complexity: a number, or an array of any shape; in `unit`.

        Raises:
            ValueError: NaN.

        Returns:
            A float, or an array of that shape.
        """
        values = np.asarray(complexity, np.float64)
        if np.isnan(values).any():
            raise ValueError("complexity: expected numbers, got NaN")
        bound = np.interp(values, self.complexity, self.expressivity)
        return float(bound) if values.ndim == 0 else bound

    def to_bits(self) -> IBCurve:
        """The same curve in bits."""
        return self._in("bits", math.log(2.0))

    def to_efficiency(self, num_bins: int) -> IBCurve:
        """The same curve in fractions of log(num_bins), the unit in which `Meter` measures."""
        check_integer("num_bins", num_bins, minimum=2, cure="pass the number of reference points of the Meter")
        return self._in("efficiency", math.log(num_bins))

    def with_info(self, **info: Any) -> IBCurve:
        """The same curve that says more about itself, in JSON values."""
        return replace(self, info={**self.info, **info})

    def _in(self, unit: str, nats: float) -> IBCurve:
        factor = self.nats_per_unit / nats
        return replace(
            self,
            complexity=self.complexity * factor,
            expressivity=self.expressivity * factor,
            mutual_information=self.mutual_information * factor,
            unit=unit,
            nats_per_unit=nats,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the curve as one JSON object, in nats, in one step; a file that is there already is replaced.

        Its last entry is a checksum of all before it.
        """
        curve = self if self.nats_per_unit == 1.0 else self._in("nats", 1.0)
        content = {
            "format": FORMAT,
            "unit": "nats",
            "complexity": curve.complexity.tolist(),
            "expressivity": curve.expressivity.tolist(),
            # JSON knows no infinity.
            "betas": [beta if math.isfinite(beta) else None for beta in curve.betas.tolist()],
            "mutual_information": curve.mutual_information,
            "num_codewords": self.num_codewords,
            **self.info,
        }
        write_atomically(path, _sealed(json.dumps(content, allow_nan=False).encode()[:-1]) + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> IBCurve:
        """Read a curve that was saved; it is in nats.

        What version 0.1.0 wrote has no checksum: it is read if it is a curve that can be.

        Raises:
            ValueError: not such a file, or one that was damaged or changed, or of a newer format.
            FileNotFoundError: there is no such file.
        """
        with open(expanded(path), "rb") as file:
            data = file.read()
        try:
            content = json_lines.parsed(data)
            number, unit = content.pop("format"), content.pop("unit")
            if number not in (1, FORMAT) or unit != "nats":
                raise ValueError(f"format {number!r} in {unit!r} is unknown to this version of ib_callback")
            if number == FORMAT:
                content.pop(_CHECKSUM, None)
                line = data.rstrip()  # whatever line break there is
                if line != _sealed(line[: -len(_sealed(b""))]):
                    raise ValueError("its checksum does not match its content")
            known = {name: content.pop(name) for name in ("complexity", "expressivity", "mutual_information")}
            betas = np.array([math.inf if beta is None else beta for beta in content.pop("betas")])
            curve = cls(**known, betas=betas, num_codewords=content.pop("num_codewords"), info=content)
            if number != FORMAT:
                curve._check_plausible()
            return curve
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{os.fspath(path)}: expected a file written by IBCurve.save, got something else or a damaged one "
                f"({describe(error)}). Compute the curve again."
            ) from error

    def _check_plausible(self) -> None:
        """Refuse what is no curve of any joint distribution: a bound that it breaks, or a corner that juts inwards."""
        c, e = self.complexity, self.expressivity
        slopes = np.diff(e) / np.diff(c)
        rounding = 1e-9 * (1 + self.mutual_information)
        if (e > np.minimum(c, self.mutual_information) + rounding).any() or (np.diff(slopes) > 1e-6).any():
            raise ValueError("it is not concave, or exceeds its complexity or its mutual information")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IBCurve):
            return NotImplemented
        return all(np.array_equal(value, getattr(other, name)) for name, value in vars(self).items())

    __hash__ = None  # type: ignore[assignment]  # arrays

    def __repr__(self) -> str:
        return (
            f"IBCurve({len(self.complexity)} corners from (0, 0) to ({self.complexity[-1]:.4g}, "
            f"{self.expressivity[-1]:.4g}) {self.unit}, I(X;Y) {self.mutual_information:.4g}, "
            f"{self.num_codewords} codewords)"
        )


def ib_curve(
    joint: Any,
    *,
    num_codewords: int | None = None,
    betas: Iterable[float] | None = None,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> IBCurve:
    """The Information Bottleneck curve of a joint distribution, as far as iteration finds it.

    From a hard code at β → ∞ (X itself if there are codewords enough, else the best of sequential clustering) β is
    lowered step by step, each time to a fixed point of the self-consistent equations, until the code says nothing;
    codewords that have become alike are joined on the way. Steps are so short that tangents, of slope 1/β, at two
    successive points leave room for little above the chord between them: 8e-5 nats, or for large problems 3e-4 of
    I(X;Y). On a joint of text this ends well above what raising β from 0 finds, where rare labels use up the codewords.

    The result is the same on every run on one kind of device, whatever the number of threads.

    Args:
        joint: [X, Y] counts or probabilities, which need not sum to one: an array, a torch tensor (dense or sparse) or
            a SciPy sparse matrix. Rows and columns of zeros are labels that never occur, and make no difference.
        num_codewords: how many values T can take; by default as many as there are different p(y | x), beyond which more
            gain nothing.
        betas: the weights β at which codes are sought, positive; by default chosen as above. The hard code at β → ∞
            belongs to the curve in any case.
        max_iterations: at each β, and three times the sweeps of sequential clustering; by default 30 to 1,000,
            fewer for larger problems.
        tolerance: in nats: iteration ends where the objective grows by less; by default 3e-6, or 1e-5 for
            large problems.
        seed: of the random starts of sequential clustering.
        device: where to iterate; by default where `joint` is.
        progress: whether to show a bar when it takes more than two seconds.

    Raises:
        ValueError: a joint that is no table of finite, non-negative numbers with a positive sum, fewer than two
            codewords, or betas that are not positive.
        TypeError: not numbers, or not integers.

    Returns:
        The curve, in nats. Of independent X and Y, or with one row or column, it is the point (0, 0).

    Examples:
        >>> ib_curve([[2, 0, 0], [0, 1, 0], [0, 0, 1]])  # Y is a function of X: the diagonal, up to H(Y)
        IBCurve(2 corners from (0, 0) to (1.04, 1.04) nats, I(X;Y) 1.04, 3 codewords)
    """
    seed = check_integer("seed", seed, minimum=0, cure="0 is the default")
    chosen = None if betas is None else _check_betas(betas)
    if num_codewords is not None:
        num_codewords = check_integer("num_codewords", num_codewords, minimum=2, cure="one codeword carries nothing")
    if max_iterations is not None:
        max_iterations = check_integer("max_iterations", max_iterations, minimum=1, cure="None chooses a good number")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a number of nats of at least 0, got {tolerance!r}.")
    where = torch.device(device) if device is not None else joint.device if isinstance(joint, torch.Tensor) else None
    reduced = Joint.of(joint)
    rows = len(reduced.rows)
    if num_codewords is None and rows > MANY_ROWS:
        raise ValueError(
            f"num_codewords: the joint has {rows:,} different rows, and a code with as many codewords would take "
            f"{8 * rows**2 / 2**30:.1f} GiB several times over. Say how many codewords to use, such as 100."
        )
    effort = Effort.of(reduced, num_codewords or rows, max_iterations=max_iterations, tolerance=tolerance)
    with progress_bar("IB curve", total=100, unit="%", shown=progress, delay=2.0) as reached:
        points = anneal(
            reduced,
            num_codewords or rows,
            effort,
            betas=chosen,
            seed=seed,
            # MPS has no float64, in which the results are added up.
            device=torch.device("cpu") if where is None or where.type == "mps" else where,
            report=lambda share: reached(round(100 * share)),
        )
    # By the data processing inequality, to which rounding does not keep.
    proper = [(c, min(e, c, reduced.mutual_information), beta) for c, e, beta in points]
    return IBCurve(
        *np.array(envelope(proper)).T,
        mutual_information=reduced.mutual_information,
        num_codewords=num_codewords or max(rows, 2),
    )


def _sealed(content: bytes) -> bytes:
    """A JSON object, given without its last brace, with its checksum."""
    return content + f', "{_CHECKSUM}": "{hashlib.sha256(content).hexdigest()}"}}'.encode()


def _check_betas(betas: Any) -> list[float]:
    values = np.asarray(betas if isinstance(betas, (np.ndarray, torch.Tensor)) else list(betas), np.float64)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"betas: expected at least one number, all finite and above 0, got {betas!r}.")
    return sorted(set(values.tolist()), reverse=True)
