"""What others get to see of a run: the Trainer's log, and the targets of `report_to`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import COURSE, follow
from tiny_hf import LENGTH, tiny_callback, tiny_trainer
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

SHOWN = ["ib/phase"]  # nothing can be selected so early


def rows_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if any(key.startswith("ib/") for key in row)]


def test_a_point_has_the_training_loss_that_was_logged_last(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=1)
    trainer = tiny_trainer(tmp_path, [callback], steps=8, logging_steps=3)
    trainer.train()
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert list(losses) == [3, 6]
    # A step is measured before it is logged.
    expected = [None, None, None, None, *[losses[3]] * 3, *[losses[6]] * 2]
    assert [point.train_loss for point in callback.trajectory] == expected


def test_log_history_has_every_point(tmp_path: Path) -> None:
    callback = tiny_callback(every_n_steps=5)
    trainer = tiny_trainer(
        tmp_path, [callback], steps=12, save_strategy="steps", save_steps=12, include_num_input_tokens_seen="all"
    )
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows] == [0, 5, 10, 12]
    assert [row["epoch"] for row in rows] == [0, 5 / 16, 10 / 16, 12 / 16]
    for row, point in zip(rows, callback.trajectory, strict=True):
        assert set(row) == {*point.metrics(), *SHOWN, "epoch", "step"}
        assert list(row)[:4] == ["ib/loss", "ib/complexity", "ib/expressivity", "ib/distance_to_bound"]
        assert {name: row[name] for name in point.metrics()} == point.metrics()
        assert all(type(value) is float for key, value in row.items() if key.startswith("ib/"))
        assert row["ib/quadgram/complexity"] == point["quadgram"].complexity
    assert [point.tokens_seen for point in callback.trajectory] == [s * 4 * LENGTH for s in (0, 5, 10, 12)]

    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert [row["ib/complexity"] for row in state["log_history"] if "ib/complexity" in row] == [
        point.complexity for point in callback.trajectory
    ]


# --- targets of report_to


class Writer:
    """As much of TensorBoard's SummaryWriter as the Trainer uses."""

    opened: list[Writer]

    def __init__(self, log_dir: str | None = None) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.closed = False
        self.opened.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        assert (name, step) not in self.scalars or not name.startswith("ib/"), "logged twice"
        self.scalars[name, step] = value

    def add_text(self, name: str, text: str, step: int | None = None) -> None:
        assert not self.closed

    def flush(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "opened", [], raising=False)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    callback = tiny_callback(every_n_steps=5, orders=("token", "bigram"))
    own: list[str] = []

    class OwnLogger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            own.extend(logs)

    trainer = tiny_trainer(tmp_path, [callback, OwnLogger()], steps=12, report_to=["tensorboard"])
    trainer.train()
    assert "loss" in own
    assert not any(name.startswith("ib/") for name in own), "it finds them in state.log_history"
    (writer,) = Writer.opened
    assert writer.closed
    ours = {key: value for key, value in writer.scalars.items() if key[0].startswith("ib/")}
    assert [point.step for point in callback.trajectory] == [0, 5, 10, 12]
    for point in callback.trajectory:
        there = {name: value for (name, step), value in ours.items() if step == point.step}
        assert {name: there[name] for name in point.metrics()} == point.metrics()
        assert set(there) == {*point.metrics(), *SHOWN}
    assert {step for _, step in ours} == {0, 5, 10, 12}
    assert {step for name, step in writer.scalars if name == "train/loss"} == {3, 6, 9, 12}


def test_tensorboards_files_have_keys_settings_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(monkeypatch)
    callback = tiny_callback(every_n_steps=5, orders="token", log_plane=True)
    tiny_trainer(tmp_path, [callback], steps=12, report_to=["tensorboard"]).train()
    (directory,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("ib/complexity")] == [0, 5, 10, 12]
    assert not any(tag.startswith("train/ib") for tag in tags["scalars"])
    assert set(tags["images"]) == {"ib/plane", "ib/over_steps", "ib/layers"}
    assert [event.step for event in events.Images("ib/plane")] == [5, 12], "whenever the points have doubled"
    (text,) = events.Tensors("ib/settings/text_summary")
    assert (
        f"| ib_probe_fingerprint | {callback._run.meter.probe.fingerprint} |"
        in text.tensor_proto.string_val[0].decode()
    )


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_another_integration_gets_every_point(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    class Remembers(integration_utils.AzureMLCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, dict[str, float]]] = []

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append((state.global_step, logs))

    target, callback = Remembers(), tiny_callback(every_n_steps=5, orders="token")
    tiny_trainer(tmp_path, [target, callback] if first else [callback, target], steps=12).train()
    ours = [(step, logs) for step, logs in target.seen if "ib/complexity" in logs]
    assert [step for step, _ in ours] == [0, 5, 10, 12]
    assert [logs["ib/complexity"] for _, logs in ours] == [COURSE[step].complexity for step in (0, 5, 10, 12)]
    assert [step for step, logs in target.seen if "loss" in logs] == [3, 6, 9, 12]


def test_a_target_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch)

    class Fails(integration_utils.AzureMLCallback):
        def __init__(self) -> None:
            pass

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "ib/complexity" in logs:
                raise ConnectionError("the service has gone")

    trainer = tiny_trainer(tmp_path, [Fails(), tiny_callback(every_n_steps=5, orders="token")], steps=12)
    with pytest.warns(RuntimeWarning, match=r"could not be logged by Fails\. .* ConnectionError: the service has gone"):
        trainer.train()
    assert [row["step"] for row in rows_of(trainer)] == [0, 5, 10, 12]
