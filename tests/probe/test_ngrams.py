"""Valid positions and groups of equal labels, against dictionaries."""

from collections import defaultdict

import numpy as np
import pytest

from ib_callback.common.errors import ProbeError
from ib_callback.probe.ngrams import context_segments, order_name, parse_orders, valid_positions, value_segments


def groups_of(segments, bit, num_positions):
    """The partition that a label set makes, as a set of frozensets of positions."""
    groups = {frozenset([p]) for p in range(num_positions) if segments.alone[p] >> bit & 1}
    for start, stop, sets in zip(segments.start, segments.stop, segments.sets, strict=True):
        if sets >> bit & 1:
            groups.add(frozenset(segments.order[start:stop].tolist()))
    return groups


def partition(keys):
    groups = defaultdict(list)
    for position, key in enumerate(keys):
        groups[key].append(position)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("largest_id", [3, 2**40])  # the second does not pack into one sort key
def test_context_segments_are_the_partitions_of_every_order(largest_id):
    contexts = np.random.RandomState(0).randint(0, 3, (200, 4)).astype(np.int64)
    contexts[contexts == 2] = largest_id
    segments = context_segments(contexts, [1, 3, 4], first_bit=2)
    for bit, width in ((2, 1), (3, 3), (4, 4)):
        assert groups_of(segments, bit, 200) == partition(map(tuple, contexts[:, :width]))


def test_labels_with_the_same_positions_share_one_group():
    # Every 5 is preceded by 6: the token label (5,) and the bigram label (5, 6) cover the same positions.
    contexts = np.array([[5, 6], [5, 6], [7, 1], [7, 2]])
    segments = context_segments(contexts, [1, 2], first_bit=0)
    assert sorted(segments.sets.tolist()) == [0b01, 0b11]
    assert segments.alone.tolist() == [0, 0, 0b10, 0b10]


def test_value_segments_skip_unlabelled_positions():
    segments = value_segments(np.array([4, -1, 9, 4, -1]), bit=1)
    assert groups_of(segments, 1, 5) == {frozenset([0, 3]), frozenset([2])}


def test_valid_positions_have_full_context_on_both_sides_whichever_side_is_padded():
    mask = np.zeros((3, 8), bool)
    mask[0, :6] = True  # padded right
    mask[1, 3:] = True  # padded left
    mask[2, 2:5] = True  # too short
    expected = [
        (b, s) for b in range(3) for s in range(8) if all(0 <= t < 8 and mask[b, t] for t in range(s - 1, s + 3))
    ]
    positions = valid_positions(mask, 2)
    assert list(zip(positions.sequence.tolist(), positions.offset.tolist(), strict=True)) == expected
    with pytest.raises(ProbeError, match=r"probe 'short': no valid position\. Expected sequences of at least 10 real"):
        valid_positions(mask, 5, probe="short")


def test_order_names():
    assert [order_name(o) for o in (1, 2, 3, 4, 5)] == ["token", "bigram", "trigram", "quadgram", "5-gram"]
    assert parse_orders("bigram") == {"bigram": 2}
    assert list(parse_orders(["quadgram", "token", "token"]).items()) == [("quadgram", 4), ("token", 1)]


@pytest.mark.parametrize("orders", [["pentagram"], ["2-gram"], ["0-gram"], ["-1-gram"], [3], ["Token"]])
def test_unknown_orders_are_named(orders):
    with pytest.raises(ValueError, match=f"unknown order {orders[0]!r}.*token, bigram, trigram, quadgram"):
        parse_orders(orders)


def test_no_orders():
    with pytest.raises(ValueError, match="expected at least one order"):
        parse_orders([])
