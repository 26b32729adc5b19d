"""The Information Bottleneck curve of a discrete joint distribution p(x, y): how much a code of X can say about Y.

The curve gives the highest expressivity I(Y;T) of a code T of X for each complexity I(X;T) (Tishby, Pereira & Bialek
1999). The iteration that finds codes may end in local maxima. So the curve found here is *achievable*: it lies at or
below the true bound. By the data processing inequality, no code of X alone lies above min(I(X;T), I(X;Y)). The true
bound lies between the two.
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
_CHECKSUM = "sha256"  # of everything before it in the file; format 1 had none
_OF_FILE = {
    "format", "unit", "complexity", "expressivity", "betas", "mutual_information", "num_codewords", _CHECKSUM,
}  # fmt: skip
# Name of the file beside the trajectory of a run, if the curve is the run's bound.
FILENAME = "ib_curve.json"


@dataclass(frozen=True, eq=False, repr=False)
class IBCurve:
    """Achievable complexity and expressivity: the corners of a concave curve that starts at (0, 0).

    The curve lies at or below the true bound, because codes of X reach it. Apart from rounding, it also lies at or
    below min(complexity, `mutual_information`), which is an upper limit of the true bound. Points between corners are
    reached by time-sharing: one code for a share of the positions and the other for the rest, which may take twice
    `num_codewords`.

    (E11 of docs/mathematics.md)

    Hidden states of a language model see more of the text than X, the token. So their point may lie above this curve,
    and above the diagonal. The excess is information from the wider context, not an error.

    Attributes:
        complexity: I(X;T) of each corner, ascending from 0.0, [k], float64.
        expressivity: I(Y;T) of each corner, ascending from 0.0, [k], float64.
        betas: β in the objective I(Y;T) − I(X;T)/β with which each corner was found, [k]; 0 at the origin, infinite
            for a hard code (a partition of X).
        mutual_information: I(X;Y), the upper limit of the expressivity.
        num_codewords: number of values that T can take.
        unit: unit of all numbers except `betas`: "nats", "bits" or "efficiency", a fraction of log(number of bins).
        nats_per_unit: number of nats in that unit.
        info: further facts in the file, as JSON values. For `probe_curve`: the probe's fingerprint, the order, K (the
            widest order) and the number of positions.
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

        It is linear between corners. For a complexity below 0, which rounding can cause, it is 0. Beyond the last
        corner it stays at the expressivity of that corner, the largest that this number of codewords achieved.

        Args:
            complexity: a number, or an array of any shape; in `unit`.

        Raises:
            ValueError: `complexity` contains NaN.

        Returns:
            A float, or an array of the same shape; in `unit`.
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
        """The same curve in fractions of log(num_bins), the unit of `Meter`."""
        check_integer("num_bins", num_bins, minimum=2, cure="pass the number of reference points of the Meter")
        return self._in("efficiency", math.log(num_bins))

    def with_info(self, **info: Any) -> IBCurve:
        """The same curve with further entries in `info`, which must be JSON values."""
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
        """Write the curve as one JSON object, in nats, in one step. An existing file is replaced.

        The last entry is a checksum of everything before it.
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
        """Read a saved curve; it is in nats.

        Files of version 0.1.0 have no checksum. They are accepted if their curve is possible for a joint distribution.

        Raises:
            ValueError: the file is not a saved curve, was damaged or changed, or has a newer format.
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
                line = data.rstrip()  # removes any kind of line break
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
                f"{os.fspath(path)}: expected a file written by IBCurve.save, got another kind of file or a damaged "
                f"one ({describe(error)}). Compute the curve again."
            ) from error

    def _check_plausible(self) -> None:
        """Raise if no joint distribution has this curve: if it exceeds a limit, or is not concave."""
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
    """Compute the Information Bottleneck curve of a joint distribution, as far as iteration finds it.

    The search starts from a hard code at β → ∞: X itself if there are enough codewords, else the best result of
    sequential clustering. Then β is lowered step by step until the code says nothing. At each step the iteration goes
    to a fixed point of the self-consistent equations, and codewords that have become equal are merged. Steps are short
    enough that the tangents at two successive points, of slope 1/β, meet at most 8e-5 nats above the chord between them
    (for large problems 3e-4 of I(X;Y)). On the joint distribution of a text this finds much better codes than raising β
    from 0, where rare labels use up the codewords.

    The result is the same on every run on one kind of device, for any number of threads.

    Args:
        joint: [X, Y] counts or probabilities, which need not sum to one: an array, a torch tensor (dense or sparse) or
            a SciPy sparse matrix. Rows and columns of zeros make no difference.
        num_codewords: number of values that T can take; by default the number of different p(y | x). More would gain
            nothing.
        betas: positive weights β at which to look for codes; by default chosen as above. The hard code at β → ∞ always
            belongs to the curve.
        max_iterations: largest number of iterations at each β, and three times the largest number of sweeps of
            sequential clustering; by default 30 to 1,000, fewer for larger problems.
        tolerance: the iteration ends when the objective grows by less than this, in nats; by default 3e-6, or 1e-5 for
            large problems.
        seed: seed of the random starts of sequential clustering.
        device: device of the iteration; by default that of `joint`.
        progress: whether to show a bar when it takes more than two seconds.

    Raises:
        ValueError: `joint` is not a table of finite, non-negative numbers with a positive sum; fewer than two
            codewords; or betas that are not positive.
        TypeError: an argument is not numeric, or not an integer where one is needed.

    Returns:
        The curve, in nats. If X and Y are independent, or if there is one row or column, it is the point (0, 0).

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
            f"num_codewords: the joint has {rows:,} different rows. A code with one codeword for each would need "
            f"several times {8 * rows**2 / 2**30:.1f} GiB. Say how many codewords to use, such as 100."
        )
    effort = Effort.of(reduced, num_codewords or rows, max_iterations=max_iterations, tolerance=tolerance)
    with progress_bar("IB curve", total=100, unit="%", shown=progress, delay=2.0) as reached:
        points = anneal(
            reduced,
            num_codewords or rows,
            effort,
            betas=chosen,
            seed=seed,
            # Not on MPS, which has no float64: the results are added up in float64.
            device=torch.device("cpu") if where is None or where.type == "mps" else where,
            report=lambda share: reached(round(100 * share)),
        )
    # Rounding can violate the data processing inequality, so expressivity is clipped.
    proper = [(c, min(e, c, reduced.mutual_information), beta) for c, e, beta in points]
    return IBCurve(
        *np.array(envelope(proper)).T,
        mutual_information=reduced.mutual_information,
        num_codewords=num_codewords or max(rows, 2),
    )


def _sealed(content: bytes) -> bytes:
    """Add a checksum to a JSON object that is given without its last brace."""
    return content + f', "{_CHECKSUM}": "{hashlib.sha256(content).hexdigest()}"}}'.encode()


def _check_betas(betas: Any) -> list[float]:
    values = np.asarray(betas if isinstance(betas, (np.ndarray, torch.Tensor)) else list(betas), np.float64)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"betas: expected at least one number, all finite and above 0, got {betas!r}.")
    return sorted(set(values.tolist()), reverse=True)
