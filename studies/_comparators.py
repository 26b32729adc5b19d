"""Measures of others, to hold ours to: intrinsic dimension, and published corrections of information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import Tensor

# Points of which the intrinsic dimension is estimated.
NEIGHBOURS = 2000
# Of the shuffle corrections: shares of the positions (the published ones), and subsamples at the whole size; of a
# share as many more as it is smaller.
SHARES = tuple(k / 10 for k in range(1, 11))
REPETITIONS = 4


def two_nn(states: Tensor) -> float:
    """Intrinsic dimension of up to 2,000 of the states [T, dim], evenly spread (Facco et al., Sci. Rep. 2017)."""
    from skdim.id import TwoNN

    chosen = np.linspace(0, len(states), min(NEIGHBOURS, len(states)), endpoint=False).astype(int)
    return float(TwoNN().fit(states[chosen].double().numpy()).dimension_)


# Shuffle corrections of Sheintuch, Rubin & Ziv, PLoS Comput. Biol. 18(2): e1009832 (2022). There a cell's activity is
# Z and the animal's place X, and a sample has t time bins; here soft assignments of a layer are Z, a token is X, and a
# sample has t positions.


def shuffle_corrections(
    tables: Tensor, labels: Sequence[np.ndarray], places: Mapping[str, int | None]
) -> dict[str, float | None]:
    """Complexity and expressivity, corrected for the size of the sample in both ways, and how well the ways fit.

    Args:
        tables: [T, L, n] soft assignments.
        labels: [T] of the preceding and of the trailing token.
        places: by name the number of a layer, or None for the mean of all, of which the curves are averaged first.

    Returns:
        By `place/method/side`; efficiencies. `fit` is R² of the extrapolation.
    """
    found: dict[str, float | None] = {}
    tables = tables.double()
    for side, own in zip(("complexity", "expressivity"), labels, strict=True):
        plain, shuffled = curves(tables, own)
        for place, index in places.items():
            a, b = (curve.mean(1) if index is None else curve[:, index] for curve in (plain, shuffled))
            found[f"{place}/ssr/{side}"] = scaled_shuffle_reduction(a[[0, -1]], b)
            found[f"{place}/bae/{side}"], found[f"{place}/bae/{side}_fit"] = bounded_extrapolation(a)
    return found


def curves(tables: Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean information of subsamples: plain [shares, L], and of shuffled labels at the least and whole size [2, L]."""
    generator = np.random.RandomState(0)
    total = len(labels)
    plain, shuffled = [], []
    for share in SHARES:
        size = int(share * total)
        repetitions = int(np.ceil(REPETITIONS / share))
        chosen = [generator.permutation(total)[:size] for _ in range(repetitions)]
        parts = chosen if share < 1 else [np.arange(total)]
        plain.append(np.mean([information(tables[part], labels[part]) for part in parts], 0))
        if share in (SHARES[0], SHARES[-1]):
            # The labels of a subsample in another order.
            pairs = [(part, generator.permutation(labels[part])) for part in chosen]
            shuffled.append(np.mean([information(tables[part], other) for part, other in pairs], 0))
    return np.stack(plain), np.stack(shuffled)


def information(tables: Tensor, labels: np.ndarray) -> np.ndarray:
    """[L] mutual information of labels [T] and soft assignments [T, L, n], as `soft_mutual_information` defines it."""
    total, layers, bins = tables.shape
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), layers * bins, dtype=tables.dtype)
    sums.index_add_(0, torch.from_numpy(inverse), tables.flatten(1))
    of_all = torch.special.entr(sums.sum(0).view(layers, bins) / total).sum(1)
    given = torch.special.entr(sums / torch.from_numpy(counts)[:, None]).view(-1, layers, bins).sum(2)
    weights = torch.from_numpy(counts / total)
    return ((of_all - (weights[:, None] * given).sum(0)) / np.log(bins)).numpy()


def scaled_shuffle_reduction(plain: np.ndarray, shuffled: np.ndarray) -> float:
    """I(t2) - I_s(t2) (I(t1) - I(t2)) / (I_s(t1) - I_s(t2)), both arguments [t1, t2] with t1 the smaller sample.

    The bias of I is taken for a fixed multiple of I_s, that of shuffled labels, whose truth is 0.
    """
    return float(plain[1] - shuffled[1] * (plain[0] - plain[1]) / (shuffled[0] - shuffled[1]))


def bounded_extrapolation(plain: np.ndarray) -> tuple[float | None, float | None]:
    """The limit a of I(t) = a + b / (1 + c t) for t to infinity, with a, b, c >= 0, by least squares; and R².

    None where the fit does not converge.
    """
    t = np.array(SHARES)
    middle = len(t) // 2
    falls = plain[0] - plain[middle], plain[middle] - plain[-1]
    start = plain[-1], max(plain[0] - plain[-1], 1e-6), max(falls[0] / max(falls[1], 1e-9) / t[middle], 1e-3)

    def curve(t: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a + b / (1.0 + c * t)

    try:
        found, _ = curve_fit(curve, t, plain, start, bounds=(0.0, np.inf), max_nfev=5000)
    except RuntimeError:
        return None, None
    variance = plain.var()
    return float(found[0]), float(1.0 - np.mean((curve(t, *found) - plain) ** 2) / variance) if variance else None
