"""Preference information of any choice of pairs, from sums over answers: what the product measures of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ib_callback as ib
import preference
from _runs import Config

PAIRS, LENGTH = 6, 12


@pytest.fixture(scope="module")
def measured() -> tuple[preference.Answers, float]:
    """Sums of a small model with random weights on answers of differing lengths, and what `measure` finds there."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (2 * PAIRS, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(8, LENGTH + 1, (2 * PAIRS, 1), generator=generator)
    labels = torch.tensor([1, 0]).repeat(PAIRS)[:, None].expand(-1, LENGTH).clone()
    labels[:, :3] = -1
    probe = ib.Probe.from_tokens(ids, mask, labels={"preference": labels})
    model = Config("tiny", "llama", 2, 16, heads=2).model()
    meter = ib.Meter(probe, orders="token", loss=False, readout=False)
    places = ib.ngram_labels(probe, "token")[0].numpy()
    answered = labels.numpy()[places[:, 0], places[:, 1]] >= 0
    layers = [table.numpy()[answered] for _, table in meter.assignments(model)]
    answers = preference.Answers.of(layers, places[answered, 0], len(probe))
    return answers, meter.measure(model).features["preference"].information


def test_information_is_the_product_s(measured: tuple[preference.Answers, float]) -> None:
    answers, expected = measured
    found = answers.information(np.ones((1, PAIRS)))
    assert found.shape == (1, 2)
    assert found.mean() == pytest.approx(expected, rel=1e-4)


def test_some_pairs_have_what_they_have_alone(measured: tuple[preference.Answers, float]) -> None:
    answers, _ = measured
    some = np.array([1, 4])
    alone = preference.Answers(*(getattr(answers, name)[some] for name in ("difference", "total", "longer", "length")))
    signs = np.array([[1.0, -1.0], [1.0, 1.0]])
    np.testing.assert_allclose(answers.information(signs, some), alone.information(signs), rtol=1e-9)


def test_swapping_all_pairs_changes_nothing(measured: tuple[preference.Answers, float]) -> None:
    answers, _ = measured
    signs = np.array([[1.0] * PAIRS, [-1.0] * PAIRS])
    found = answers.information(signs)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_the_tables_are_of_the_committed_results() -> None:
    text = "\n".join(preference.report())
    assert "nan" not in text
    assert "| trained, embeddings |" in text
