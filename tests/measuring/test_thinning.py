"""Which positions are looked at where all would cost too much."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ib_callback as ib
from ib_callback.measuring.quantities.documents import long_enough
from ib_callback.measuring.thinning import POSITIONS, evenly, neighbours, pairs_for_loss, positions_for_prediction
from ib_callback.probe.ngrams import Positions, valid_positions


def probe_of(lengths: list[int], left: bool = False) -> ib.Probe:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(0))
    return ib.Probe.from_tokens(ids, mask.flip(1) if left else mask)


def places(probe: ib.Probe, positions: Positions) -> list[tuple[int, int]]:
    return list(zip(positions.sequence.tolist(), positions.offset.tolist(), strict=True))


def most_uneven(chosen: np.ndarray, total: int) -> float:
    """By how many things the number of those chosen among the first n differs from their share, at most."""
    taken = np.zeros(total)
    taken[chosen] = 1
    return float(np.abs(taken.cumsum() - np.arange(1, total + 1) * len(chosen) / total).max())


@pytest.mark.parametrize(
    ("total", "number"), [(1000, 100), (12_288, 8192), (8193, 8192), (100_000, 8192), (7, 3), (5, 5), (3, 5)]
)
def test_one_from_each_stretch(total, number):
    chosen = evenly(total, number, seed=1)
    assert len(chosen) == min(total, number)
    assert (np.diff(chosen) > 0).all(), "none twice"
    assert 0 <= chosen[0] <= chosen[-1] < total
    assert most_uneven(chosen, total) <= 2
    assert chosen.tolist() == evenly(total, number, seed=1).tolist()
    if 1000 <= 2 * number < total:
        assert chosen.tolist() != evenly(total, number, seed=2).tolist()


@pytest.mark.parametrize("number", [0, 100, 8192, 9000, 20_000, 10**6])
@pytest.mark.parametrize("left", [False, True])
def test_pairs_of_the_loss_are_even_and_share_the_first_ones(number, left):
    probe = probe_of([97, 60, 130, 2, 1] * 100, left)
    every = places(probe, neighbours(probe))
    mask = probe.attention_mask.tolist()
    assert every == [(row, s) for row in range(500) for s in range(129) if mask[row][s] and mask[row][s + 1]]
    pairs = places(probe, pairs_for_loss(probe, number, seed=4))
    assert len(pairs) == min(number, len(every))
    assert pairs == sorted(set(pairs))
    of = {pair: place for place, pair in enumerate(every)}
    assert most_uneven(np.array([of[pair] for pair in pairs], int), len(every)) <= 4
    if number >= POSITIONS:
        assert set(places(probe, pairs_for_loss(probe, POSITIONS, seed=4))) <= set(pairs)


SHAPES = {
    "few": ([64] * 100, 4),
    "few in long ones": ([900] * 9, 1),
    "a few more than that": ([130] * 68, 4),
    "long ones": ([512] * 100, 4),
    "many": ([512] * 600, 4),
    "many of all lengths": ([512, 300, 60, 20] * 200, 4),
    "many just long enough": ([60] * 2000, 4),
    "some long among short ones": ([30] * 3000 + [512] * 20, 4),
    "mostly too short for an n-gram": ([5] * 20_000 + [40] * 400, 4),
    "too short for what is local": ([40] * 3000, 2),
}


@pytest.mark.parametrize(("lengths", "widest"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("left", [False, True])
def test_positions_of_predictions(lengths, widest, left):
    probe = probe_of(lengths, left)
    valid = valid_positions(probe.attention_mask.numpy(), widest)
    chosen = positions_for_prediction(probe, valid, seed=5)
    found, all_valid = places(probe, chosen), places(probe, valid)
    assert found == sorted(set(found)) and set(found) <= set(all_valid)
    assert found == places(probe, positions_for_prediction(probe, valid, seed=5))
    if len(valid) <= POSITIONS:
        assert found == all_valid
        return
    assert found != places(probe, positions_for_prediction(probe, valid, seed=6))
    assert POSITIONS // 2 < len(found) <= POSITIONS
    of = {place: number for number, place in enumerate(all_valid)}
    numbers = np.array([of[place] for place in found])
    is_local = 2 * len(long_enough(valid)) >= len(valid)
    # There is a document baseline where there is one of all positions.
    assert (2 * len(long_enough(chosen)) >= len(chosen)) == is_local
    even = set(places(probe, pairs_for_loss(probe, POSITIONS, seed=5)))
    if set(found) <= even:
        assert most_uneven(numbers, len(valid)) < 0.01 * len(found)
        return
    # Otherwise whole stretches of some sequences, or, where valid positions are rare, even ones of these.
    sequences, count = np.unique(chosen.sequence, return_counts=True)
    if not is_local:
        assert most_uneven(numbers, len(valid)) <= 2
        return
    assert len(sequences) == 128 and count.max() <= 64 and count.min() >= 48
    has_enough = np.flatnonzero(np.bincount(valid.sequence) >= 48)
    assert most_uneven(np.searchsorted(has_enough, sequences), len(has_enough)) <= 2
    for sequence in sequences[:5]:
        own = np.flatnonzero(valid.sequence == sequence)
        taken = np.searchsorted(own, numbers[np.isin(numbers, own)])
        assert most_uneven(taken, len(own)) <= 2


def test_which_shapes_are_even():
    """Whole sequences are for probes of more sequences than 8,192 positions would give enough of."""
    even = {}
    for name, (lengths, widest) in SHAPES.items():
        probe = probe_of(lengths)
        valid = valid_positions(probe.attention_mask.numpy(), widest)
        found = set(places(probe, positions_for_prediction(probe, valid, seed=0)))
        even[name] = found <= set(places(probe, pairs_for_loss(probe, POSITIONS, seed=0)))
    assert [name for name, is_even in even.items() if not is_even] == [
        "many", "many of all lengths", "many just long enough", "mostly too short for an n-gram",
    ]  # fmt: skip


def test_sequences_do_not_all_give_the_same_places():
    probe = probe_of([512] * 600)
    chosen = positions_for_prediction(probe, valid_positions(probe.attention_mask.numpy(), 1), seed=0)
    first = [chosen.offset[chosen.sequence == sequence].tolist() for sequence in np.unique(chosen.sequence)[:3]]
    assert first[0] != first[1] != first[2]
