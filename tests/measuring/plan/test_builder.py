"""The plan's invariants, and that its pieces, slots and kept histograms add up to plain sums."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import ib_callback as ib
from ib_callback.estimator.histogram import entropy
from ib_callback.measuring.accumulate import Accumulator
from ib_callback.measuring.plan.batches import PIECE
from ib_callback.measuring.planner import make_plan

ORDERS = {"token": 1, "bigram": 2}


def make_probe(num_sequences=30, length=20, vocabulary=6, labels=None):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (num_sequences, length), generator=generator)
    mask = torch.arange(length) < torch.randint(8, length + 1, (num_sequences, 1), generator=generator)
    return ib.Probe.from_tokens(ids, mask, labels=labels)


def assignments_of(plan, num_layers=2, num_bins=5):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.softmax(3 * torch.randn(len(b.positions), num_layers, num_bins, generator=generator), -1)
        for b in plan.batches
    ]


def sums_of(plan, tables, weighting="empirical"):
    accumulator = Accumulator(plan, *tables[0].shape[1:], weighting=weighting, device=torch.device("cpu"))
    for batch, table in zip(plan.batches, tables, strict=True):
        accumulator.add(batch, table)
    return accumulator.sums()


@pytest.mark.parametrize("num_groups", [0, 4])
def test_a_slot_holds_one_running_sum_at_a_time_and_is_reused_and_shared(num_groups):
    plan = make_plan(
        make_probe(200, vocabulary=60), ORDERS, (), batch_size=3, null=False, seed=0, num_groups=num_groups
    )
    slots: dict[int, frozenset[int]] = {}  # which positions are added up in each
    begun: dict[int, int] = {}  # batch of each position
    closed, written = [], 0
    for number, batch in enumerate(plan.batches):
        flat = [20 * (batch.sequences.start + p // batch.width) + p % batch.width for p in batch.positions.tolist()]
        begun |= dict.fromkeys(flat, number)
        members = [flat[i] for i in batch.members.tolist()]
        pieces = [frozenset(members[a:z]) for a, z in pairwise(batch.offsets.tolist())]
        assert len(set(pieces)) == len(pieces), "the same positions are added up once"
        to = batch.open_slot.tolist() + batch.more_to.tolist()
        assert len(set(to)) == len(to)
        assert not set(to) & set(batch.more_slot.tolist()), "no running sum is changed"
        before = [frozenset()] * len(batch.open_slot) + [slots[slot] for slot in batch.more_slot.tolist()]
        added = [pieces[i] for i in batch.open_piece.tolist() + batch.more_piece.tolist()]
        assert not any(a & b for a, b in zip(before, added, strict=True))
        slots |= {slot: a | b for slot, a, b in zip(to, before, added, strict=True)}
        whole = [slots[slot] for slot in batch.close_slot[batch.close_row].tolist()]
        assert [len(positions) for positions in whole] == batch.close_count.tolist()
        closed += [
            (bit, positions)
            for positions, sets in zip(whole, batch.close_sets.tolist(), strict=True)
            for bit in range(4)
            if sets >> bit & 1
        ]
        written += len(to)
    ids = make_probe(200, vocabulary=60).input_ids.flatten().tolist()
    expected = []
    for bit, (begin, end) in enumerate([(0, 1), (-1, 1), (1, 2), (1, 3)]):
        groups: dict[tuple[int, ...], set[int]] = {}
        for position in begun:
            groups.setdefault(tuple(ids[position + begin : position + end]), set()).add(position)
        expected += [(bit, frozenset(group)) for group in groups.values() if len({begun[p] for p in group}) > 1]
    assert not len(plan.late.sets)
    assert len(closed) == len(expected)
    assert set(closed) == set(expected)
    assert plan.num_slots < written < sum(len({begun[p] for p in group}) for _, group in expected)


def test_pieces_are_short_and_hold_the_positions_of_their_batch():
    plan = make_plan(make_probe(60, vocabulary=2), ORDERS, (), batch_size=30, null=True, seed=0)
    for batch in plan.batches:
        lengths = batch.offsets.diff()
        assert 1 <= lengths.min() <= lengths.max() <= PIECE
        assert len(batch.long_target) > 0  # two tokens only: every token label fills several pieces
        assert 0 <= batch.members.min() <= batch.members.max() < len(batch.positions)


def test_labels_of_one_batch_take_no_slot():
    plan = make_plan(make_probe(), ORDERS, (), batch_size=30, null=False, seed=0)
    assert len(plan.batches) == 1
    assert plan.num_slots == 0


def test_batches_cut_trailing_padding_and_leave_out_sequences_without_valid_positions():
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:2, 3:] = False  # three tokens: no position has two before and two after it
    mask[2:, 9:] = False
    probe = ib.Probe.from_tokens(torch.ones(4, 12, dtype=torch.long), mask)
    plan = make_plan(probe, ORDERS, (), batch_size=2, null=False, seed=0)
    assert [(b.sequences, b.width) for b in plan.batches] == [(slice(2, 4), 9)]
    # Of 9 tokens, offsets 1 to 6 have two tokens up to them and two after.
    assert plan.batches[0].positions.tolist() == [1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("weighting", ["empirical", "uniform"])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_conditional_sums_are_those_of_a_dictionary(weighting, batch_size):
    probe = make_probe()
    plan = make_plan(probe, ORDERS, (), batch_size=batch_size, null=False, seed=0)
    tables = assignments_of(plan)
    sums = sums_of(plan, tables, weighting)
    histograms: dict = {label_set.name: {} for label_set in plan.label_sets}
    for batch, table in zip(plan.batches, tables, strict=True):
        for flat, row in zip(batch.positions.tolist(), table.double(), strict=True):
            ids = probe.input_ids[batch.sequences.start + flat // batch.width].tolist()
            s = flat % batch.width
            for name, width in ORDERS.items():
                before, after = tuple(ids[s - width + 1 : s + 1]), tuple(ids[s + 1 : s + 1 + width])
                for quantity, label in (("complexity", before), ("expressivity", after)):
                    histograms[quantity, name].setdefault(label, []).append(row)
    for i, label_set in enumerate(plan.label_sets):
        rows = histograms[label_set.name].values()
        expected = sum(entropy(sum(r)) * (len(r) if weighting == "empirical" else 1) for r in rows)
        assert label_set.num_labels == len(rows)
        np.testing.assert_allclose(sums.conditional[i].numpy(), expected.numpy(), rtol=1e-6)


def test_kept_histograms_are_sums_over_their_positions():
    language = torch.arange(30).remainder(3)[:, None].expand(30, 20)
    plan = make_plan(make_probe(labels={"language": language}), ORDERS, ("language",), batch_size=4, null=True, seed=0)
    tables = assignments_of(plan)
    sums = sums_of(plan, tables)
    rows = torch.cat(tables).double()
    np.testing.assert_allclose(sums.kept[plan.total].numpy(), entropy(rows.sum(0)).numpy(), rtol=1e-6)
    np.testing.assert_allclose(sums.single.numpy(), entropy(rows).sum(0).numpy(), rtol=1e-6)
    subset = plan.nulls[0].design.subsets[-1]
    kept = sums.kept[plan.nulls[0].subsets][-1]
    np.testing.assert_allclose(kept.numpy(), entropy(rows[torch.from_numpy(subset)].sum(0)).numpy(), rtol=1e-6)
    # One permutation of languages over whole sequences, label 1.
    feature = plan.quantities[-1]
    sequence = torch.cat([b.sequences.start + b.positions // b.width for b in plan.batches])
    members = torch.from_numpy(feature.labels.permuted[7])[sequence] == 1
    assert feature.permutations.count[7, 1] == int(members.sum())
    permuted = sums.kept[feature.permutations.kept[7, 1]]
    np.testing.assert_allclose(permuted.numpy(), entropy(rows[members].sum(0)).numpy(), rtol=1e-6)


def test_memory_grows_with_what_is_measured_at_once():
    plan = make_plan(make_probe(), ORDERS, (), batch_size=4, null=True, seed=0)
    assert plan.memory(4, 100) == 2 * plan.memory(2, 100) == 4 * plan.memory(2, 50)


def test_labels_in_many_batches_are_summed_in_float64(monkeypatch):
    probe = make_probe(300, vocabulary=3)
    plan = make_plan(probe, {"token": 1}, (), batch_size=1, null=False, seed=0)
    assert plan.late.kept.stop - plan.late.kept.start == 6  # three tokens on either side
    assert plan.num_slots == 0
    # Assignments alike but for one bit in a thousand: a float32 running sum over 300 batches would drift.
    tables = [torch.full((len(b.positions), 1, 4), 0.25) * (1 + 1e-3 * torch.rand(1, 1, 4)) for b in plan.batches]
    sums = sums_of(plan, tables)
    expected = 0.0
    token = torch.cat([probe.input_ids[b.sequences.start].take(b.positions) for b in plan.batches])
    rows = torch.cat(tables).double()
    for value in range(3):
        members = rows[token == value]
        expected += len(members) * float(entropy(members.sum(0)))
    assert float(sums.conditional[0, 0]) == pytest.approx(expected, rel=1e-11)


def test_no_valid_position():
    probe = ib.Probe.from_tokens(torch.ones(3, 7, dtype=torch.long))
    with pytest.raises(
        ib.ProbeError, match=r"no valid position.*at least 8 real tokens.*got at most 7.*narrower orders"
    ):
        make_plan(probe, {"quadgram": 4}, (), batch_size=2, null=True, seed=0)


def test_no_worker_adds_up_many_rows_one_after_the_other():
    """On a GPU one walks along each segment: at most 512 rows of it, with batches of up to 64 x 512 tokens."""
    ids = torch.randint(0, 3, (64, 512), generator=torch.Generator().manual_seed(0))  # each label is frequent
    (batch,) = ib.Meter(ib.Probe.from_tokens(ids), orders="token", batch_size=64).plan().batches
    longest = {name: int(getattr(batch, name).diff().max()) for name in ("offsets", "long_offsets", "kept_offsets")}
    assert longest["offsets"] == PIECE
    assert max(longest.values()) <= 512
