"""The look at the training data: what is looked at, what is left alone, and that nothing is ever raised."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import ib_callback as ib
from ib_callback.run.training_data import look_for_probes

ROWS = torch.randint(0, 60, (40, 16), generator=torch.Generator().manual_seed(11))
HELD_OUT = ib.Probe.from_tokens(torch.randint(0, 60, (6, 16), generator=torch.Generator().manual_seed(7)), name="clean")
LEAKED = ib.Probe.from_tokens(ROWS[[0, 39]], name="leaked")


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("iterated")


class Numbered:
    """Remembers which examples it was asked for."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.asked = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        assert type(number) is int
        self.asked.append(number)
        return self.rows[number]


def loader(dataset: Any) -> Any:
    return DataLoader(dataset, batch_size=4)


@pytest.mark.parametrize(
    "loaders",
    [
        loader(Numbered(ROWS)),
        loader(TensorDataset(ROWS, ROWS)),
        loader(Subset(Numbered(ROWS), range(40))),
        loader(datasets.Dataset.from_dict({"input_ids": ROWS.tolist()})),
        [loader([{"input_ids": row.tolist()} for row in ROWS])],
        {"a": loader(Numbered(ROWS))},
    ],
)
def test_a_probe_that_is_trained_on_is_a_warning_with_numbers(loaders):
    with pytest.warns(
        RuntimeWarning,
        match=r"Probe 'leaked' is not held out from the training data: 2 of 2 sequences share a run of 13 tokens "
        r"with the 40 texts \(640 tokens\) examined\. 2 of them occur there as a whole\. 100\.00% of the 13-grams",
    ):
        assert look_for_probes([LEAKED], loaders, 1000) == ""


def test_one_that_is_held_out_is_a_sentence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = look_for_probes([HELD_OUT], loader(ROWS), 40)
    assert said == "probe 'clean' shares no run of 13 tokens with 40 examples of the training data (640 tokens)"


@pytest.mark.parametrize(("count", "asked"), [(1, [0]), (3, [0, 19, 39]), (40, list(range(40))), (99, list(range(40)))])
def test_examples_at_equal_distances(count, asked):
    dataset = Numbered(ROWS)
    look_for_probes([HELD_OUT], loader(dataset), count)
    assert dataset.asked == asked


@pytest.mark.parametrize(
    ("loaders", "why"),
    [
        (DataLoader(Stream()), "Stream can only be iterated, and reading it here would use up its examples"),
        (loader(datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()), "can only be iterated"),
        ([ROWS[:4]], "the loader of the training batches has no .dataset"),
        (None, "has no .dataset"),
        (iter([ROWS]), "has no .dataset"),
    ],
)
def test_what_cannot_be_read_by_number_is_left_alone(loaders, why):
    with pytest.warns(RuntimeWarning, match=f"was not searched for the probe: .*{why}.*probe.overlap"):
        assert look_for_probes([LEAKED], loaders, 10) == ""


class Failing(Numbered):
    def __getitem__(self, number: int) -> Any:
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        (Failing(ROWS), "OSError: the disk is gone"),
        (Numbered(["some text"]), "ProbeError: texts can be compared only as tokens"),
        (Numbered([object()]), "TypeError: data: expected a text or a sequence"),
    ],
)
def test_a_dataset_that_fails_is_a_warning(dataset, why):
    with pytest.warns(RuntimeWarning, match=f"could not be searched for the probe. Training goes on. {why}"):
        assert look_for_probes([LEAKED], loader(dataset), 10) == ""
