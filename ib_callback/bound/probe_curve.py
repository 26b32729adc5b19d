"""The joint distribution of preceding and trailing context on a probe, and its Information Bottleneck curve."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from ib_callback.bound.curve import FORMAT, IBCurve, ib_curve
from ib_callback.common.cache import build_once, cache_file
from ib_callback.common.checks import check_integer
from ib_callback.common.messages import note
from ib_callback.probe.ngrams import ORDER_NAMES, parse_orders, valid_positions
from ib_callback.probe.probe import Probe

# Raise this number whenever the curve of the same probe changes; old files are then not read again.
ALGORITHM = 2


@dataclass(frozen=True)
class ProbeJoint:
    """How often each pair of labels occurs.

    counts: [X, Y] integer counts, sparse (COO); they add up to the number of valid positions.
    inputs: [X, o] token ids of each input label: the o tokens that end at the position, in reading order.
    outputs: [Y, o] token ids of each output label: the o tokens after the position.
    """

    counts: sp.coo_matrix
    inputs: np.ndarray
    outputs: np.ndarray

    @property
    def num_positions(self) -> int:
        """Number of valid positions T."""
        return int(self.counts.data.sum())


def probe_joint(probe: Probe, order: str = "token", *, orders: str | Iterable[str] = tuple(ORDER_NAMES)) -> ProbeJoint:
    """Count the pairs of input and output labels of one n-gram order over the valid positions of a probe.

    Args:
        probe: frozen text.
        order: order of the labels: `"token"`, `"bigram"`, …
        orders: all orders that are measured together; the widest decides which positions are valid.

    Raises:
        ProbeError: no position is valid.
        ValueError: `order` is unknown, or not among `orders`.
    """
    widths = parse_orders(orders)
    if order not in widths:
        raise ValueError(f"order: expected one of orders= ({', '.join(widths)}), got {order!r}.")
    widest, width = max(widths.values()), widths[order]
    positions = valid_positions(probe.attention_mask.numpy(), widest, probe=probe.name)
    ids = probe.input_ids.numpy()
    steps = np.arange(1 - width, 1)
    sequence, offset = positions.sequence[:, None], positions.offset[:, None]
    inputs, x = _number(ids[sequence, offset + steps])
    outputs, y = _number(ids[sequence, offset + steps + width])
    pairs, counts = np.unique(x * len(outputs) + y, return_counts=True)
    rows, columns = np.divmod(pairs, len(outputs))
    return ProbeJoint(
        sp.coo_matrix((counts, (rows, columns)), shape=(len(inputs), len(outputs))),
        inputs,
        outputs,
    )


def _number(contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, and for each row the number of its distinct row."""
    distinct, number = np.unique(contexts, axis=0, return_inverse=True)
    return distinct, number.reshape(-1).astype(np.int64)


def probe_curve(
    probe: Probe,
    *,
    order: str = "token",
    orders: str | Iterable[str] = tuple(ORDER_NAMES),
    num_codewords: int = 100,
    cache: bool = True,
    progress: bool = False,
) -> IBCurve:
    """Compute the Information Bottleneck curve of a probe's own joint distribution p(x, y), on the CPU.

    It is the curve of the sample: a code that has memorised the sample could reach it. The curve is computed once and
    then kept in `ib_callback/ib_curves` below the user's cache directory (`$XDG_CACHE_HOME`, by default `~/.cache`). If
    several processes need it, one computes and the others wait. If nothing can be kept, each computes the same.

    Args:
        probe: frozen text.
        order: order of the labels.
        orders: all orders that are measured together; the widest decides which positions are valid.
        num_codewords: number of values that a code can take. To compare with measurements, pass the number of bins.
        cache: whether to keep the curve, and to use a kept one.
        progress: whether to show a bar when it takes more than two seconds.

    Raises:
        ProbeError: no position is valid, or the probe was changed in place.
        ValueError: `order` is unknown or not among `orders`, or there are fewer than two codewords.

    Warns:
        RuntimeWarning: the curve cannot be kept, or the kept file is damaged.

    Returns:
        The curve, in nats. `.to_efficiency(num_bins)` converts it to the unit of measurements. Its `info` holds the
        probe's fingerprint, the order, K (the widest order) and the number of valid positions.
    """
    check_integer("num_codewords", num_codewords, minimum=2, cure="pass the number of bins, 100 by default")
    widths = parse_orders(orders)
    probe.verify()

    def build() -> IBCurve:
        joint = probe_joint(probe, order, orders=widths)
        rows, columns = joint.counts.shape
        note(f"computing the IB curve of probe {probe.name!r} ({order} labels: {rows} x {columns})")
        curve = ib_curve(joint.counts, num_codewords=num_codewords, progress=progress)
        return curve.with_info(
            probe=probe.fingerprint, order=order, K=max(widths.values()), num_positions=joint.num_positions
        )

    def read(path: Path) -> IBCurve:
        curve = IBCurve.load(path)
        asked = {"probe": probe.fingerprint, "order": order, "K": max(widths.values())}
        if any(curve.info.get(key) != value for key, value in asked.items()) or curve.num_codewords != num_codewords:
            raise ValueError(f"{path} does not hold the curve that its name says")
        return curve

    if not cache or order not in widths:
        return build()
    # Files of an earlier format have no checksum; their curves are computed again.
    name = f"{probe.fingerprint}-{order}-K{max(widths.values())}-{num_codewords}-v{ALGORITHM}.{FORMAT}.json"
    what = f"the IB curve of probe {probe.name!r}"
    path = cache_file("ib_curves", name, what=what)
    if path is None:
        return build()
    return build_once(path, build, write=lambda path, curve: curve.save(path), read=read, what=what)
