"""Versions of real models: their states and losses, and how numbers are held against the losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import _runs as runs
import _versions
import ib_callback as ib
import real_models


@pytest.fixture(scope="module")
def probe() -> ib.Probe:
    return ib.Probe.from_tokens(torch.randint(0, 500, (4, 40), generator=torch.Generator().manual_seed(0)))


def test_states_are_those_of_the_probe_s_sequences_in_their_order(probe: ib.Probe) -> None:
    model = runs.Config("tiny", "llama", 2, 16, heads=2).model().eval()
    hooks = _versions.States(model, probe)
    ib.measure(model, probe, orders="token", batch_size=3)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))  # of no sequence
        found = hooks.close()
        expected = model(probe.input_ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found["last"], expected[-1])
    torch.testing.assert_close(found["middle"], expected[1])
    _versions.check_head(model, probe.input_ids)


def test_losses_are_those_of_the_model_and_no_better_at_another_scale(probe: ib.Probe) -> None:
    model = runs.Config("tiny", "llama", 1, 16, heads=2).model().eval()
    with torch.no_grad():
        logits = model(probe.input_ids).logits * 30.0  # confidently wrong
        model.get_output_embeddings().weight *= 30.0  # its embeddings, too: states are given from before
        states = torch.linalg.lstsq(model.get_output_embeddings().weight, logits.flatten(0, 1).T).solution.T
        found = _versions.losses(model, probe, states.view(4, 40, -1))
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), probe.input_ids[:, 1:], reduction="none")
    expected = [float(row[number % 2 :: 2].mean()) for number, row in enumerate(each)]
    assert found["loss"] == pytest.approx(expected, rel=1e-3)
    assert found["scale"] < 0.5
    assert np.mean(found["refitted"]) < np.mean(found["loss"])


def version(loss: float, value: float | None, noise: np.ndarray) -> dict[str, object]:
    number = {"value": value, "se": 0.1, "without": None if value is None else list(value + noise)}
    return {
        "refitted": {"value": loss, "without": [loss] * real_models.GROUPS},
        "values": {"readout/token/score_local": number},
    }


@pytest.mark.parametrize(
    ("values", "size", "ranks", "right"),
    [
        ([3.0, 2.0, 1.0], 0.0, -1.0, 1.0),
        ([1.0, 2.0, 3.0], 0.0, 1.0, 0.0),
        ([3.0, 2.0, None], 0.0, -1.0, 1.0),  # undefined counts as worst
        ([3.0, 2.0, 1.0], 0.01, -1.0, 1.0),  # what all versions have in common changes no order
    ],
)
def test_a_number_is_held_against_the_refitted_loss(
    values: list[float | None], size: float, ranks: float, right: float
) -> None:
    noise = size * np.random.RandomState(0).standard_normal(real_models.GROUPS)
    rows = [version(loss, value, noise) for loss, value in zip((3.0, 4.0, 5.0), values, strict=True)]
    z = np.random.RandomState(1).standard_normal((50, real_models.GROUPS))
    held = real_models.Held.against_loss(real_models.Versions(rows, z), "readout/token/score_local")
    assert (held.ranks, held.right, held.pairs) == (pytest.approx(ranks), right, 3)
    assert held.of_ranks == pytest.approx((ranks, ranks))
    assert held.of_right == (right, right)


def test_the_tables_are_of_the_committed_results() -> None:
    text = "\n".join(real_models.report())
    assert "nan" not in text
    assert all(f"### {model}: against the refitted loss" in text for model in real_models.MODELS)
