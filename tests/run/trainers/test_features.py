"""Feature probes beside the plane, standard errors, and the look at the training data."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loops import Loop
from tiny_hf import pairs, random_ids, random_states, same_weights, tiny_probe

import ib_callback as ib
from ib_callback.results.phases import PhaseRule


def test_features_are_measured_beside_the_plane(loop: Loop, tmp_path: Path, open_run: Any) -> None:
    stopping = ib.PlateauStopping(monitor="preference/information", mode="max", arm="fit")
    keywords = {"feature_probes": [pairs()], "select": "preference", "early_stopping": stopping, "select_from": 0}
    # Of three pairs at least a quarter of all labellings says as much as any other.
    with pytest.warns(RuntimeWarning, match="The best point is step .* This may be chance: random labels reach as"):
        outcome = loop.train(tmp_path / "with", save_every=6, orders="token", every_n_steps=5, **keywords)
    assert same_weights(outcome.weights, loop.train(tmp_path / "without", follows=False).weights)
    trajectory = outcome.followed.trajectory
    assert trajectory.steps == [0, 5, 6, 10, 12]
    expected = ib.measure(
        outcome.model, tiny_probe(), feature_probes=[pairs()], orders="token", num_bins=12, batch_size=3
    )
    assert trajectory[-1].features == expected.features
    assert ib.Trajectory.load(tmp_path / "with")[-1].features == expected.features
    row, feature = open_run.points(loop)[12], expected.features["preference"]
    assert (row["ib/preference/ratio"], row["ib/preference/information"]) == (feature.ratio, feature.information)
    assert row["ib/selectable/preference/information"] == feature.information
    best = max((p for p in trajectory if p.step in (6, 12)), key=lambda p: p.features["preference"].information)
    assert outcome.followed.selected.step == best.step


def test_from_trained_weights_a_feature_selects_a_checkpoint_and_whether_it_is_resolved_is_said(
    loop: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in preference tuning: no phases, no guard, and a warning where labels at random say as much."""
    keywords = {"feature_probes": [pairs()], "from_trained": True, "limited": True}
    # What so small a model expresses is noise, by which it would seem to collapse.
    keywords["select"] = ib.Selection("preference/ratio", least_learned=0.0)
    keywords["phase_rule"] = PhaseRule(collapse=0.0, plane="plain")
    with pytest.warns(RuntimeWarning, match="This may be chance: random labels reach as much in "):
        outcome = loop.train(tmp_path, steps=12, save_every=4, every_n_steps=4, orders="token", **keywords)
    followed = outcome.followed
    ratios = {point.step: point.features["preference"].ratio for point in followed.trajectory}
    best = max((4, 8, 12), key=ratios.__getitem__)
    assert (followed.selected.step, followed.selected.value) == (best, ratios[best])
    assert not followed.selected.fallback
    assert followed.selected.path.exists()
    assert set(followed.trajectory.phases().phases) == {None}
    said = capsys.readouterr().err
    assert "so it has no phases, and rules act from the first point on, without the guard" in said


def test_a_feature_that_cannot_be_measured_is_a_missing_point(loop: Loop, tmp_path: Path) -> None:
    at: list[int] = []

    def forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        if at and any(torch.equal(row, pairs().input_ids[0]) for row in ids):
            raise RuntimeError("no such answer")
        return getattr(model, "net", model)(input_ids=ids, attention_mask=mask)

    keywords = {"every_n_steps": 3, "orders": "token", "feature_probes": [pairs()], "forward": forward}
    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 3. .*RuntimeError: no such answer"):
        outcome = loop.train(tmp_path, steps=6, on_step=lambda model, step: at.append(step), **keywords)
    assert [point.error is None for point in outcome.followed.trajectory] == [True, False, False]


def test_standard_errors_reach_the_log_and_the_file(loop: Loop, tmp_path: Path, open_run: Any) -> None:
    trajectory = loop.train(tmp_path, every_n_steps=5, standard_errors=3).followed.trajectory
    logged = [row["ib/token/optimality_se"] for row in open_run.points(loop).values()]
    assert logged == [point["token"].optimality_se for point in trajectory]
    assert len(logged) == 4
    stored = ib.Trajectory.load(tmp_path)
    assert ib.difference(stored[-1], stored[0]) == ib.difference(trajectory[-1], trajectory[0])


# --- the look at the training data


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """Draws random numbers at every example, as augmentation does."""

    def __init__(self) -> None:
        self.rows = random_ids(64, seed=11)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        return self.rows[number]


def test_a_look_at_the_training_data_changes_nothing(trainer: Loop, tmp_path: Path) -> None:
    left = []
    for check_overlap in (0, 40):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", module="ib_callback")
            warnings.filterwarnings("error", message=".*probe")
            keywords = {"every_n_steps": 5, "orders": "token", "check_overlap": check_overlap}
            outcome = trainer.train(tmp_path / str(check_overlap), steps=6, data=Noisy(), **keywords)
        left.append((outcome.weights, random_states()))
    assert same_weights(left[0][0], left[1][0])
    assert left[0][1] == left[1][1]


def test_training_on_the_probe_is_a_warning(trainer: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_ids(64, seed=11)
    keywords = {"check_overlap": 64, "feature_probes": [pairs()], "orders": "token", "every_n_steps": 2}
    with pytest.warns(RuntimeWarning, match="Probe 'leaked' is not held out from the training data: 6 of 6 sequences"):
        trainer.train(tmp_path, steps=2, data=rows, probe=ib.Probe.from_tokens(rows[:6], name="leaked"), **keywords)
    assert "probe 'pairs' shares no run of 13 tokens with 64 examples" in capsys.readouterr().err
