"""A joint distribution p(x, y) for the iteration: checked, without empty rows or columns, and reduced without error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import xlogy


@dataclass(frozen=True)
class Joint:
    """A reduced joint distribution.

    Rows with the same p(y | x) are merged into one row, and columns with the same p(x | y) into one column. No code
    can distinguish them, so neither I(X;T) nor I(Y;T) of an optimal code changes.

    probability: [R, C] float64 CSR, sums to 1; no empty row or column.
    conditional: p(y | x), with the same structure.
    rows, columns: [R], [C] marginals p(x), p(y).
    mutual_information: I(X;Y) in nats, in [0, min(H(X), H(Y))].
    """

    probability: sp.csr_matrix
    conditional: sp.csr_matrix
    rows: np.ndarray
    columns: np.ndarray
    mutual_information: float

    @classmethod
    def of(cls, joint: Any) -> Joint:
        """From a table [X, Y] of counts or probabilities, dense or sparse; see `ib_curve`."""
        table = _merge(_table(joint))
        probability = table / table.sum()
        rows = np.asarray(probability.sum(1)).ravel()
        columns = np.asarray(probability.sum(0)).ravel()
        conditional = _divided_by_rows(table)
        # Computed as a divergence of each row from the mean, because entropies would cancel if X says little.
        terms = probability.data * (np.log(conditional.data) - np.log(columns[conditional.indices]))
        limit = min(float(-xlogy(p, p).sum()) for p in (rows, columns))
        return cls(probability, conditional, rows, columns, float(np.clip(terms.sum(), 0.0, limit)))


def _table(joint: Any) -> sp.csr_matrix:
    """The non-zero rows and columns as float64 CSR."""
    if isinstance(joint, torch.Tensor):
        joint = joint.detach().cpu()
        joint = joint if joint.is_complex() else joint.double()
        if joint.layout == torch.strided or joint.ndim != 2:
            joint = joint.to_dense().numpy()
        else:
            coo = joint.to_sparse_coo().coalesce()
            joint = sp.coo_matrix((coo.values().numpy(), tuple(coo.indices().numpy())), shape=tuple(coo.shape))
    elif not sp.issparse(joint):
        joint = np.asarray(joint)
    if joint.ndim != 2:
        raise ValueError(f"joint: expected a table [X, Y] with two dimensions, got shape {joint.shape}.")
    if joint.dtype.kind not in "buif":
        raise TypeError(f"joint: expected real numbers, got dtype {joint.dtype}.")
    table = sp.csr_matrix(joint, dtype=np.float64)
    table.sum_duplicates()
    bad = int((~np.isfinite(table.data)).sum()), int((table.data < 0).sum())
    if any(bad):
        raise ValueError(
            f"joint: expected counts or probabilities, which are finite and not negative, got {bad[0]} entries that "
            f"are NaN or infinite and {bad[1]} below zero."
        )
    table.eliminate_zeros()
    if table.nnz == 0:
        raise ValueError(
            f"joint: expected a table [X, Y] of counts or probabilities with a positive sum, got one of shape "
            f"{tuple(table.shape)} without a positive entry."
        )
    # Scaled by a power of two, which is exact for any float, so neither sums nor quotients leave float64's range.
    table.data = np.ldexp(table.data, -int(np.frexp(table.data.max())[1]))
    table.eliminate_zeros()
    kept_rows = np.flatnonzero(np.diff(table.indptr))
    kept_columns = np.unique(table.indices)
    return table[kept_rows][:, kept_columns].tocsr()


def _merge(table: sp.csr_matrix) -> sp.csr_matrix:
    """Add up rows with the same conditional distribution, then columns, until no two are the same."""
    while True:
        shape = table.shape
        table = _merge_rows(table)
        table = _merge_rows(table.T.tocsr()).T.tocsr()
        table.sort_indices()
        if table.shape == shape:
            return table


def _merge_rows(table: sp.csr_matrix) -> sp.csr_matrix:
    table.sort_indices()
    # Quotients of counts are correctly rounded, so proportional rows of counts agree to the last bit.
    conditional = _divided_by_rows(table)
    group: dict[tuple[bytes, bytes], int] = {}
    number = np.empty(table.shape[0], np.int64)
    for row in range(table.shape[0]):
        entries = slice(table.indptr[row], table.indptr[row + 1])
        key = (table.indices[entries].tobytes(), conditional.data[entries].tobytes())
        number[row] = group.setdefault(key, len(group))
    if len(group) == table.shape[0]:
        return table
    adds_up = sp.csr_matrix(
        (np.ones(table.shape[0]), (number, np.arange(table.shape[0]))), shape=(len(group), table.shape[0])
    )
    merged = (adds_up @ table).tocsr()
    merged.sort_indices()
    return merged


def _divided_by_rows(table: sp.csr_matrix) -> sp.csr_matrix:
    conditional = table.copy()
    conditional.data = table.data / np.repeat(np.asarray(table.sum(1)).ravel(), np.diff(table.indptr))
    return conditional
