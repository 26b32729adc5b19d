"""Sequences that share a source: how a probe is told, what its null permutes, and what is left out together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from word_tokenizer import word_tokenizer

import ib_callback as ib
from ib_callback.measuring.plan.jackknife import group_sequences
from ib_callback.measuring.quantities.features import feature_labels
from ib_callback.measuring.statistics import probe_statistics
from ib_callback.probe.ngrams import valid_positions

TEXTS = ["a b c", "short", "d e f", "g h i", "j k l"]
SOURCES = ["one", "two", "two", "one", "three"]
ROWS = [{"text": text, "book": source} for text, source in zip(TEXTS, SOURCES, strict=True)]


def of_tokens(groups: Any, number: int = 4) -> ib.Probe:
    return ib.Probe.from_tokens(torch.arange(8 * number).view(number, 8), groups=groups)


@pytest.mark.parametrize(
    "probe",
    [
        of_tokens(["one", "two", "one", "three"]),
        of_tokens(torch.tensor([7, 3, 7, 9])),
        ib.Probe.from_texts(TEXTS, word_tokenizer(), min_length=4, groups=SOURCES),
        ib.Probe.for_tokenizers(TEXTS, {"a": word_tokenizer()}, min_length=4, groups=SOURCES)["a"],
        ib.Probe.from_dataset(ROWS, word_tokenizer(), min_length=4, num_sequences=None, group_column="book"),
    ],
    ids=["tokens", "tensor", "texts", "tokenizers", "rows"],
)
def test_groups_are_numbered_kept_and_no_part_of_the_fingerprint(probe: ib.Probe, tmp_path: Path) -> None:
    assert probe.groups == (0, 1, 0, 2)
    probe.save(tmp_path / "probe.safetensors")
    assert ib.Probe.load(tmp_path / "probe.safetensors").groups == (0, 1, 0, 2)
    assert ib.Probe.from_tokens(probe.input_ids, probe.attention_mask).fingerprint == probe.fingerprint
    assert of_tokens(None).groups is None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a"], "groups: expected the source of each of the 4 sequences, got 1 entries"),
        ("abcd", "groups: expected the source of each of the 4 sequences, got str"),
        ([1, None, 2, 3], "expected an integer or a string for each sequence, got None for sequence 1"),
        ([1, 0.5, 2, 3], "got 0.5 for sequence 1"),
    ],
)
def test_unusable_groups_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ib.ProbeError, match=message):
        of_tokens(groups)


def test_texts_and_rows_without_a_source_are_refused() -> None:
    with pytest.raises(ib.ProbeError, match="groups: expected 5 entries"):
        ib.Probe.from_texts(TEXTS, word_tokenizer(), min_length=4, groups=SOURCES[:4])
    with pytest.raises(ib.ProbeError, match=r"groups: text 1: expected the source .* got None"):
        ib.Probe.from_texts(TEXTS, word_tokenizer(), min_length=4, groups=["one", None, "two", "one", "two"])
    rows = [ROWS[0], {"text": "d e f", "book": None}]
    with pytest.raises(ib.ProbeError, match="row 1, column 'book': expected the source"):
        ib.Probe.from_dataset(rows, word_tokenizer(), min_length=4, num_sequences=None, group_column="book")
    with pytest.raises(ib.ProbeError, match="and a column of sources in group_column="):
        ib.Probe.from_dataset(ROWS, word_tokenizer(), min_length=4, group_column="author")


def permuted(labels: list[int], groups: list[int]) -> tuple[np.ndarray, str | None]:
    table = np.repeat(np.array(labels)[:, None], 6, axis=1)
    positions = valid_positions(np.ones(table.shape, bool), 1)
    found = feature_labels("author", table, positions, 0, groups)
    assert found.permuted is not None
    return found.permuted, found.by_source


def test_where_sources_have_one_label_each_they_are_permuted_as_wholes() -> None:
    groups = [0, 0, 1, 2, 2, 2, 3]
    rows, by_source = permuted([1, 1, 0, 1, 1, 1, 0], groups)
    assert by_source == "over"
    assert (rows[:, 0] == rows[:, 1]).all()
    assert (rows[:, 3] == rows[:, 4]).all()
    assert (rows[:, 4] == rows[:, 5]).all()
    of_source = rows[:, [0, 2, 3, 6]]
    assert (of_source.sum(1) == 2).all()
    assert len(np.unique(of_source, axis=0)) == 6  # all ways to choose two of four


def test_where_a_source_has_several_its_sequences_are_permuted() -> None:
    groups = [0, 1, 0, 1, 0, 2]
    rows, by_source = permuted([0, 1, 1, 2, 1, 1], groups)
    assert by_source == "within"
    for source, expected in ((0, [0, 1, 1]), (1, [1, 2]), (2, [1])):
        of_source = rows[:, np.array(groups) == source]
        assert (np.sort(of_source, axis=1) == expected).all()
        assert len(np.unique(of_source, axis=0)) == {0: 3, 1: 2, 2: 1}[source]


def test_sequences_without_a_label_stay_without() -> None:
    rows, by_source = permuted([0, -1, 1, 1, -1], [0, 0, 1, 1, 1])
    assert by_source == "over"
    assert (rows[:, [1, 4]] == -1).all()
    assert (rows[:, 2] == rows[:, 3]).all()


def test_one_sequence_a_source_is_as_without_groups() -> None:
    alone, by_source = permuted([0, 1, 0, 1], [3, 2, 1, 0])
    assert by_source is None
    table = np.repeat(np.array([0, 1, 0, 1])[:, None], 6, axis=1)
    assert (feature_labels("author", table, valid_positions(np.ones(table.shape, bool), 1), 0).permuted == alone).all()


def test_statistics_say_what_is_permuted() -> None:
    labels = {"author": torch.tensor([[0] * 8, [0] * 8, [1] * 8, [1] * 8])}
    for groups, words in (
        ([0, 0, 1, 1], "permuted by whole sources"),
        ([0, 1, 0, 1], "permuted by whole sequences within each source"),
        (None, "permuted by whole sequences"),
    ):
        probe = ib.Probe.from_tokens(torch.arange(32).view(4, 8), labels=labels, groups=groups)
        assert probe_statistics(probe).features["author"].null == words


@pytest.mark.parametrize(
    ("sources", "bounds"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], [0, 2, 4, 8]),
        ([0, 1, 0, 2, 2, 2, 3, 4], [0, 3, 6, 8]),  # sequence 1 lies between those of source 0
        ([0, 1, 2, 3, 4, 5, 6, 0], [0, 8]),
    ],
)
def test_what_is_left_out_has_whole_sources(sources: list[int], bounds: list[int]) -> None:
    groups = group_sequences(np.arange(8), 8, 3, 2, paired=False, sources=sources)
    assert groups.sequence_bounds.tolist() == bounds
    assert set(bounds) <= set(groups.batch_bounds.tolist())


def test_pairs_and_sources_hold_together() -> None:
    groups = group_sequences(np.arange(8), 8, 8, 8, paired=True, sources=[0, 0, 1, 1, 1, 1, 2, 2])
    assert groups.sequence_bounds.tolist() == [0, 2, 6, 8]


def test_too_few_sources_for_standard_errors_are_an_error() -> None:
    meter = ib.Meter(of_tokens([0, 0, 1, 1]), orders=["token"], standard_errors=True)
    with pytest.raises(ib.ProbeError, match=r"Those of one source, .* count as one\. .* texts of one source next"):
        meter.plan()


def test_groups_are_among_the_settings() -> None:
    model = Sourced(torch.zeros(4, 8))
    with_groups, without = (
        ib.Meter(of_tokens(groups), orders=["token"], layers=["layer"]).settings(model)
        for groups in ([0, 0, 1, 1], None)
    )
    assert "groups" not in without
    assert list(with_groups.pop("groups")) == ["tokens"]
    assert with_groups == without


class Sourced(nn.Module):
    """States that tell the source of a sequence, which its tokens are, and nothing of any label."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = nn.Parameter(states)
        self.layer = nn.Identity()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return self.layer(self.states[input_ids])


def test_labels_of_sources_that_say_nothing_are_rarely_significant_with_groups_and_often_without() -> None:
    """Of 40 probes, each with labels drawn at random for 12 sources of 6 sequences."""
    random = np.random.RandomState(0)
    sources = np.repeat(np.arange(12), 6)
    rare = {True: 0, False: 0}
    for _ in range(40):
        model = Sourced(torch.from_numpy(random.standard_normal((12, 16)).astype(np.float32)))
        label = random.permutation(np.repeat([0, 1], 6))[sources]
        ids = torch.from_numpy(sources)[:, None].expand(72, 6)
        labels = {"author": torch.from_numpy(label)[:, None].expand(72, 6)}
        for with_groups in rare:
            groups = sources if with_groups else None
            probe = ib.Probe.from_tokens(ids, labels=labels, groups=groups)
            found = ib.measure(
                model, probe, orders=["token"], layers=["layer"], num_bins=8, batch_size=72, null=True, baseline=False
            )
            p_value = found.features["author"].information_p_value
            assert p_value is not None
            rare[with_groups] += p_value < 0.05
    # Expected are 2; with a chance of 1 in 200 more than 6 of 40 are below.
    assert rare[True] <= 6
    assert rare[False] >= 20
