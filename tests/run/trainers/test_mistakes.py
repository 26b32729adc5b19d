"""Mistakes are found before training time is spent; what goes wrong later costs one point."""

from __future__ import annotations

import io
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Loop
from tiny_hf import VOCABULARY, pairs, random_ids, same_weights, tiny_model, weights

import ib_callback as ib
import ib_callback.plot
from ib_callback.common.errors import ModelError, TrajectoryError

SLOW = ib.PhaseRule(drop=0.2)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"every": 5}, TypeError, "unknown keyword every; it takes every_n_steps, .* and those of Meter: .*num_bins"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps: expected an integer of at least 1, got 0; or pass"),
        ({"num_bins": 1}, ValueError, "num_bins"),
        *[
            ({"overhead_budget": budget}, ValueError, "overhead_budget is a share .* between 0 and 1, .* got ")
            for budget in (0, 1, -0.1, 1.5, math.nan)
        ],
        ({"tokens_per_step": 0}, ValueError, "tokens_per_step: expected an integer of at least 1, got 0; all devices"),
        ({"tokens_per_step": 2.5}, TypeError, r"tokens_per_step: expected an integer of at least 1, got 2\.5"),
        ({"early_stopping": "plateau"}, TypeError, r"early_stopping: expected an ib\.PlateauStopping or None, got 'pl"),
        *[
            (
                {"early_stopping": ib.PlateauStopping(monitor, mode="min"), "orders": "token"},
                ValueError,
                rf"PlateauStopping\('{monitor}'.* cannot work: no metric '{monitor}' .*token/distance_to_bound",
            )
            for monitor in ("bigram/distance_to_bound", "distance", "preference")
        ],
        ({"select": 3}, TypeError, r"select: expected the name of a metric or feature, or an ib\.Selection, got 3"),
        *[
            (
                {"select": select, "orders": ("token", "bigram")},
                ValueError,
                f"select='{select}' cannot work: no metric '{select}' is measured.*token/optimality, .*bigram",
            )
            for select in ("optimalty", "trigram/optimality", "preference", "phase")
        ],
        *[
            ({"select": select, **settings}, ValueError, f"'{select}' cannot work: no metric .* may need loss=True")
            for select, settings in (
                ("loss", {"loss": False}),
                ("bits_per_byte", {}),  # this probe does not know its bytes
                ("token/optimality_above_null", {"null": False}),
                ("late/token/optimality_local", {}),  # its sequences are short
                *(
                    (name, {"num_bins": 100, "preset": "paper", "feature_probes": [pairs()]})
                    for name in ("loss", "optimality_above_null", "token/score_local", "preference/ratio_above_null")
                ),
            )
        ],
        *[
            ({"select": f"{view}/optimality", view: False}, ValueError, rf"is measured\. {view}/… needs {view}=True")
            for view in ("readout", "prediction")
        ],
        ({"select": "entropy"}, ValueError, 'neither high nor low entropy is known to be better. Pass mode="min"'),
        ({"select": "optimality", "select_from": "later"}, ValueError, "select_from must be .* got 'later'"),
        ({"preset": "paper"}, ValueError, "preset='paper': expected num_bins=100, got num_bins=12. Leave this out"),
        ({"check_overlap": -3}, ValueError, "check_overlap: expected an integer of at least 0, got -3"),
        ({"orders": ("token", "pentagram")}, ValueError, "unknown order 'pentagram'"),
        ({"feature_probe": [pairs()]}, TypeError, "unknown keyword feature_probe; it takes .*feature_probes"),
        ({"feature_probes": [pairs(), pairs()]}, ValueError, "'preference' of probe 'pairs' has the name of a label"),
        ({"feature_probes": [pairs()], "select": "language"}, ValueError, "no metric 'language' is measured"),
        (
            {"phase_rule": ib.PhaseRule(drop=0.1), "early_stopping": ib.PlateauStopping(phase_rule=SLOW)},
            ValueError,
            "one rule for the whole run, got different ones of phase_rule and early_stopping",
        ),
    ],
)  # fmt: skip
def test_settings_are_checked_when_it_is_made(
    loop: Loop, keywords: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        loop.train(tmp_path, **keywords)
    assert list(tmp_path.iterdir()) == []


def test_a_rule_that_looks_the_wrong_way_is_a_warning(loop: Loop, tmp_path: Path) -> None:
    rule = ib.PlateauStopping("optimality")
    with pytest.warns(RuntimeWarning, match="treats a change for the worse as an improvement; did you mean mode='max'"):
        loop.train(tmp_path, steps=1, early_stopping=rule, orders="token")


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            {"probe": ib.Probe.from_tokens(random_ids(3, seed=0, vocabulary=300))},
            ModelError,
            f"outside the model's vocabulary of {VOCABULARY}",
        ),
        ({"layers": ["nothing.*"]}, ModelError, "no module of .* is called 'nothing"),
        (
            {"feature_probes": [pairs(vocabulary=900)]},
            ModelError,
            "probe 'pairs': token id .* is outside the model's vocabulary",
        ),
        ({"output_dir": "file/below"}, TrajectoryError, "cannot write to the output directory"),
        ({"output_dir": "linked"}, TrajectoryError, r"ib_trajectory\.jsonl: expected a file that this run can write"),
    ],
    ids=["tokenizer", "layers", "tokenizer of features", "directory", "dangling link"],
)
def test_mistakes_are_raised_before_the_first_step(
    loop: Loop, keywords: dict[str, Any], error: type[Exception], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("linked").mkdir()
    Path("linked/ib_trajectory.jsonl").symlink_to("no/where")
    steps: list[int] = []
    with pytest.raises(error, match=message):
        loop.train(tmp_path / "run", on_step=lambda model, step: steps.append(step), **keywords)
    assert steps == []


def called(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    """`forward=` for the model of any loop: Lightning's module holds it as `net`."""
    return getattr(model, "net", model)(input_ids=input_ids, attention_mask=attention_mask)


def test_a_mistake_found_by_the_first_measurement(loop: Loop, tmp_path: Path) -> None:
    calls, steps = [], []

    def forward(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:  # the preflight's pass was well
            raise TypeError("a mistake of the user")
        return called(*arguments)

    with pytest.raises(TypeError, match="a mistake of the user"):
        loop.train(tmp_path, forward=forward, on_step=lambda model, step: steps.append(step))
    assert len(calls) == 2
    assert steps == []


# --- while training runs


def test_a_model_that_goes_bad_costs_one_point(loop: Loop, tmp_path: Path, open_run: Any) -> None:
    """Its outputs are NaN when it is measured at 5, and well again before the next step."""
    bad: list[Any] = []

    def on_step(model: Any, step: int) -> None:
        while bad:
            bad.pop().remove()
        if step == 5:
            spoil = lambda part, inputs, output: output if part.training else output * math.nan  # noqa: E731
            bad.append(model.transformer.wte.register_forward_hook(spoil))

    with pytest.warns(RuntimeWarning, match="Nothing could be measured at step 5.*RepresentationError") as caught:
        outcome = loop.train(tmp_path, steps=15, every_n_steps=5, orders="token", on_step=on_step)
    assert len([w for w in caught if "Nothing could be measured" in str(w.message)]) == 1
    assert outcome.step == 15
    trajectory = outcome.followed.trajectory
    assert [point.error is None for point in trajectory] == [True, False, True, True]
    assert trajectory[1].step == 5
    assert "NaN" in trajectory[1].error
    assert trajectory[1].complexity is None
    assert ib.Trajectory.load(tmp_path) == trajectory
    assert list(open_run.points(loop)) == [0, 10, 15]


def test_running_out_of_memory_costs_one_point(loop: Loop, tmp_path: Path) -> None:
    at: list[int] = []

    def forward(*arguments: Any) -> Any:
        if at and at[-1] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return called(*arguments)

    keywords = {"every_n_steps": 5, "batch_size": 1, "orders": "token", "forward": forward}
    with pytest.warns(RuntimeWarning, match="measured at step 5.*OutOfMemoryError: CUDA out of memory"):
        outcome = loop.train(tmp_path, on_step=lambda model, step: at.append(step), **keywords)
    assert [point.error is None for point in outcome.followed.trajectory] == [True, False, True, True]
    assert outcome.left == loop.train(tmp_path / "without", steps=1, follows=False).left
    assert not same_weights(weights(tiny_model()), outcome.weights)


class MuteError(RuntimeError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Gone(io.StringIO):
    """A stream whose reader is gone; for the package alone, for the Trainers' own bars would end their training."""

    def write(self, text: str) -> int:
        if sys._getframe(1).f_globals["__name__"].startswith("ib_callback"):
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)


WRONG = ("stream", "no stream", "warnings", "words", "matplotlib")


@pytest.mark.parametrize("wrong", WRONG)
def test_no_way_out_is_needed(wrong: str, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what goes wrong in a way that cannot be said, training knows nothing."""
    at: list[int] = [0]

    def schedule(step: int) -> bool:
        if at[-1] == 4:
            raise MuteError
        return step % 2 == 0

    def on_step(model: Any, step: int) -> None:
        at.append(step)
        if wrong in ("stream", "no stream"):
            monkeypatch.setattr(sys, "stderr", Gone() if wrong == "stream" else None)
        elif wrong == "warnings":
            warnings.filterwarnings("error", category=RuntimeWarning)
        elif wrong == "matplotlib":
            # What imports it anew sets the attribute of the package as well, which is to be put back.
            monkeypatch.setattr(ib, "plot", ib_callback.plot)
            for name in [name for name in sys.modules if name.startswith(("matplotlib", "ib_callback.plot"))]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))

    keywords: dict[str, Any] = {"orders": "token", "log_plane": wrong == "matplotlib", "progress": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        followed = {**keywords, "every_n_steps": schedule if wrong in ("words", "warnings") else 2}
        outcome = loop.train(tmp_path / "followed", steps=6, on_step=on_step, **followed)
    monkeypatch.undo()
    alone = loop.train(tmp_path / "alone", steps=6, follows=False)
    assert outcome.step == 6
    assert same_weights(outcome.weights, alone.weights)
    steps = [0, 2, 6] if wrong in ("words", "warnings") else [0, 2, 4, 6]
    assert ib.Trajectory.load(tmp_path / "followed").steps == outcome.followed.trajectory.steps == steps
    assert all(point.error is None for point in outcome.followed.trajectory)


@pytest.mark.parametrize("measuring", [False, True], ids=["training", "measuring"])
def test_an_interrupt_is_not_swallowed_and_the_files_are_whole(measuring: bool, loop: Loop, tmp_path: Path) -> None:
    at: list[int] = []

    def on_step(model: torch.nn.Module, step: int) -> None:
        at.append(step)
        if step == 7 and not measuring:
            raise KeyboardInterrupt

    def forward(*arguments: Any) -> Any:
        if measuring and at and at[-1] == 9:
            raise KeyboardInterrupt
        return called(*arguments)

    with pytest.raises((KeyboardInterrupt, SystemExit), match=r"^1?$"):  # Lightning would end its process
        loop.train(tmp_path, every_n_steps=3, orders="token", on_step=on_step, forward=forward)
    assert at[-1] == (9 if measuring else 7)
    assert ib.Trajectory.load(tmp_path).steps == [0, 3, 6]
