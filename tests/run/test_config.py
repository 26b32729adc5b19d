"""The keywords that all trainers share: in every signature, and one rule of phases among them."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import ib_callback as ib
from ib_callback import hf, lightning
from ib_callback.run.config import RunConfig, split_keywords

OF_METER = [name for name, p in inspect.signature(ib.Meter).parameters.items() if p.kind is p.KEYWORD_ONLY]
OF_RUN = [field.name for field in fields(RunConfig)]


@pytest.mark.parametrize(
    ("callback", "own"), [(hf.IBCallback, []), (lightning.IBCallback, ["weights"])], ids=["hf", "lightning"]
)
def test_signatures_say_what_is_taken(callback: type, own: list[str]) -> None:
    assert list(inspect.signature(callback).parameters) == ["probe", *own, *OF_RUN, *OF_METER]
    assert inspect.signature(callback).parameters["every_n_steps"].default == 500
    assert inspect.signature(callback).parameters["num_bins"].default == 100
    assert {"output_dir", "wandb", "select"} < set(inspect.signature(ib.Run).parameters)


@pytest.mark.parametrize("taker", [hf.IBCallback, lightning.IBCallback, ib.Run], ids=["hf", "lightning", "run"])
def test_signatures_have_types_that_command_lines_can_read(taker: type) -> None:
    parameters = inspect.signature(taker).parameters
    assert not [name for name, p in parameters.items() if isinstance(p.annotation, str)]
    assert get_type_hints(taker.__init__)["early_stopping"] == ib.PlateauStopping | None


@pytest.mark.parametrize("callback", [hf.IBCallback, lightning.IBCallback], ids=["hf", "lightning"])
def test_a_command_line_passes_every_keyword_and_a_preset_works(callback: type) -> None:
    probe = ib.Probe.from_tokens([[1] * 20])
    every = {name: p.default for name, p in inspect.signature(callback).parameters.items() if name != "probe"}
    for keywords in ({"preset": "paper"}, every | {"preset": "paper"}):
        meter = callback(probe, **keywords)._run.meter
        assert (meter.preset, meter.temperature, meter.weighting, meter.loss) == ("paper", 1.0, "uniform", False)


def test_subclasses_take_what_they_like() -> None:
    probe = ib.Probe.from_tokens([[1] * 20])
    for base in (hf.IBCallback, lightning.IBCallback):

        class Own(base):  # type: ignore[misc, valid-type]
            def __init__(self, rate: float, probe: ib.Probe, **keywords: object) -> None:
                super().__init__(probe, **keywords)
                self.rate = rate

        assert Own(0.1, probe, num_bins=7).rate == 0.1
        assert list(inspect.signature(Own).parameters) == ["rate", "probe", "keywords"]


def test_values_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"phase_rule: expected an ib\.PhaseRule or None, got 3"):
        RunConfig(phase_rule=3)
    with pytest.raises(TypeError, match=r"output_dir: expected a path or None, got 5"):
        RunConfig(output_dir=5)
    for value in (1, 0, "yes", np.True_):
        with pytest.raises(TypeError, match="from_trained: expected True, False or None, got"):
            RunConfig(from_trained=value)


@pytest.mark.parametrize("taker", [RunConfig, ib.PlateauStopping, ib.Selection, ib.Trajectory])
def test_a_guard_is_a_word_a_number_or_none(taker: type) -> None:
    for given in (0.03, 1, np.float64(0.25), np.float32(0.5), np.int64(2)):
        guard = taker(guard=given).guard
        assert (type(guard), guard) == (float, given)
    for wrong in (0, -1, float("inf"), float("nan"), True, np.float32("nan"), "los", [], np.array([1.0, 2.0])):
        with pytest.raises(ValueError, match=r'guard: expected "loss", a tolerance in nats .*, got'):
            taker(guard=wrong)


@pytest.mark.parametrize(
    "steps",
    [[0, 100], (100, 0), {0, 100}, range(0, 200, 100), np.array([0, 100]), (x for x in (0, 100)), iter([0, 100])],
    ids=lambda steps: type(steps).__name__,
)
def test_a_list_of_steps_may_be_whatever_can_be_gone_through(steps: Any) -> None:
    config = RunConfig(every_n_steps=steps)
    for _ in range(2):  # a generator gives its steps once
        assert [step for step in range(201) if config.schedule(step)] == [0, 100]
    assert replace(config, select="loss").schedule == config.schedule


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        ([], ValueError, "every_n_steps: expected at least one step, got none"),
        ((x for x in ()), ValueError, "every_n_steps: expected at least one step, got none"),
        (np.array(500), TypeError, r"every_n_steps: expected an integer, a list of steps .* got array\(500\)"),
        (torch.tensor(500), TypeError, r"every_n_steps: expected an integer, a list of steps .* got tensor\(500\)"),
        ("500", TypeError, "every_n_steps: expected an integer of at least 1, got '500'"),
        ([5.0], TypeError, r"every_n_steps: expected an integer of at least 0, got 5\.0"),
    ],
)
def test_what_is_no_schedule(steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RunConfig(every_n_steps=steps)


def test_no_keyword_is_of_both() -> None:
    assert not set(OF_RUN) & set(OF_METER)
    config, of_meter = split_keywords("X", {"select": "optimality", "num_bins": 7})
    assert config == RunConfig(select="optimality")
    assert of_meter == {"num_bins": 7}


FIRST, SECOND = ib.PhaseRule(drop=0.1), ib.PhaseRule(drop=0.2)


@pytest.mark.parametrize(
    ("keywords", "rule"),
    [
        ({}, ib.PhaseRule()),
        ({"phase_rule": FIRST}, FIRST),
        ({"early_stopping": ib.PlateauStopping(phase_rule=FIRST), "select": "optimality"}, FIRST),
        ({"early_stopping": ib.PlateauStopping(), "select": ib.Selection(phase_rule=FIRST)}, FIRST),
        ({"phase_rule": FIRST, "early_stopping": ib.PlateauStopping(phase_rule=FIRST)}, FIRST),
    ],
)
def test_the_rule_that_somebody_chose_is_that_of_the_run(keywords: dict[str, object], rule: ib.PhaseRule) -> None:
    assert RunConfig(**keywords).rule_of_phases() == rule


def test_two_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="different ones of early_stopping and select"):
        RunConfig(early_stopping=ib.PlateauStopping(phase_rule=FIRST), select=ib.Selection(phase_rule=SECOND))


def test_the_number_of_examples_to_look_at() -> None:
    assert RunConfig(check_overlap=np.int64(5)).check_overlap == 5
    with pytest.raises(ValueError, match="check_overlap: expected an integer of at least 0, got -1"):
        RunConfig(check_overlap=-1)
    with pytest.raises(TypeError, match="check_overlap: expected an integer of at least 0, got True"):
        RunConfig(check_overlap=True)


def test_a_home_in_a_path_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path.replace("~", "/home/somebody"))
    assert RunConfig(output_dir="~/out").output_dir == "/home/somebody/out"
    assert RunConfig(output_dir=Path("~/out")).output_dir == "/home/somebody/out"
    for kept in ("out", Path("a~b"), None, "C:/out"):
        assert RunConfig(output_dir=kept).output_dir is kept
    assert RunConfig(output_dir="file:///a%20b/c").output_dir == "/a b/c"


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://b", "hdfs://a/b", "memory://x", "simplecache::s3://b"])
def test_an_address_on_another_file_system_is_no_folder(address: str) -> None:
    with pytest.raises(ValueError, match=r"output_dir: expected a folder on this machine, got .*a local folder"):
        RunConfig(output_dir=address)
