"""Choose what to measure on a probe, and plan it once, before the first measurement."""

from __future__ import annotations

import numpy as np

from ib_callback.common.errors import ProbeError
from ib_callback.measuring.plan.builder import Builder
from ib_callback.measuring.plan.jackknife import Groups, group_sequences
from ib_callback.measuring.plan.memory import trim
from ib_callback.measuring.plan.plan import Baseline, Plan, Wanted
from ib_callback.measuring.quantities import kinds
from ib_callback.measuring.thinning import positions_for_prediction
from ib_callback.probe.ngrams import Positions, valid_positions
from ib_callback.probe.probe import Probe


def make_plan(
    probe: Probe,
    orders: dict[str, int],
    features: tuple[str, ...],
    *,
    batch_size: int,
    null: bool,
    seed: int,
    baseline: Baseline | None = None,
    planes: bool = True,
    num_groups: int = 0,
    predicted: bool = False,
) -> Plan:
    """Plan the measurement of `probe`.

    Args:
        probe: the probe to measure on.
        orders: names and widths; the widest decides which positions are valid.
        features: names of probe labels.
        batch_size: sequences in a forward pass.
        null: whether to plan for null information.
        seed: seed of the random subsets, permutations and shifts.
        baseline: which document baseline to plan for.
        planes: whether to plan for the orders; if not, positions without a label of any feature are left out.
        num_groups: groups of sequences to leave out in turn for standard errors; 0 for none.
        predicted: whether to plan only for the positions at which next-token distributions are measured
            (thinning.py). Batches and groups are those of the plan for all positions.

    Raises:
        ProbeError: no position is valid, a feature has no label at any of them, or fewer than three groups can be made.
    """
    mask = probe.attention_mask.numpy()
    width = max(orders.values())
    positions = valid_positions(mask, width, probe=probe.name)
    if not planes:
        positions = _labelled(positions, [probe.labels[name].numpy() for name in features])
    groups = _group(probe, positions, num_groups, batch_size) if num_groups else None
    if predicted:
        positions = positions_for_prediction(probe, positions, seed)
    builder = Builder(positions, groups)
    total = builder.keep_total(np.arange(len(positions)))
    wanted = Wanted(probe, orders if planes else {}, features, total, null, baseline, seed)
    quantities = tuple(quantity for kind in kinds() for quantity in kind.plan(builder, wanted))
    bounds = np.append(np.arange(0, len(mask), batch_size), len(mask)) if groups is None else groups.batch_bounds
    plan = builder.build(mask, bounds, total, quantities)
    del builder
    trim()
    return plan


def _labelled(positions: Positions, tables: list[np.ndarray]) -> Positions:
    """The positions with a label in any table; all positions if there are none, because `Feature.plan` reports that."""
    carries = np.any([table[positions.sequence, positions.offset] >= 0 for table in tables], axis=0)
    return Positions(positions.sequence[carries], positions.offset[carries]) if carries.any() else positions


def _group(probe: Probe, positions: Positions, num_groups: int, batch_size: int) -> Groups:
    used = np.unique(positions.sequence)
    groups = group_sequences(
        used,
        len(probe),
        num_groups,
        batch_size,
        paired="preference" in probe.labels and len(probe) % 2 == 0,
        sources=probe.groups,
    )
    if groups.number < 3:  # after leaving out two neighbours, something must be left
        of_sources = ". Those of one source, and all between them, count as one" if probe.groups else ""
        raise ProbeError(
            f"probe {probe.name!r}: expected at least three sequences (or preference pairs) with valid positions for "
            f"standard errors, got {len(used)} sequences{of_sources}. Use a larger probe, with texts of one source "
            "next to each other, or standard_errors=False."
        )
    return groups
