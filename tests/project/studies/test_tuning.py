"""What models are fine-tuned on: text that no probe has a part of, and pairs with the loss of DPO."""

from __future__ import annotations

import gzip
import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import _runs as runs
import _tuning
import fine_tuning
import ib_callback as ib
import preference

BETA = 0.3
TINY = runs.Config("tiny", "llama", 1, 16, heads=2, steps=4, batch=2, rate=0.01, warmup=2, points=1, base="base")


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    sizes = {"LENGTH": 32, "VOCABULARY": 300, "PROBE_SEQUENCES": 1, "VALIDATION_SEQUENCES": 4}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(runs, name, value)
        patch.setattr(preference, "PROMPT", 6)
        patch.setattr(preference, "LENGTH", 32)
        patch.setattr(runs.Config, "measured_steps", lambda config: [0, 2, config.steps])
        yield


@pytest.fixture(scope="module")
def folder(_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all data: every document of C4 is one letter again and again, so that its tokens say whose they are."""
    folder = tmp_path_factory.mktemp("tuning")
    letters = string.ascii_letters[:40]
    rows = {
        "c4_sample": [{"text": letter * 100} for letter in letters],
        "novels": [{"text": f"the {letter} of it " * 40} for letter in letters[: runs.HELD_OUT + 3]],
        "preferences_sample": [
            {"prompt": f"what is {a}?", "chosen": f"it is the {a} of it, " * 4, "rejected": f"no {a} is {a} " * 4}
            for a in letters[:20]
        ],
    }
    for name, each in rows.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in each)
    (folder / "base" / "weights").mkdir(parents=True)
    torch.save(TINY.model().state_dict(), folder / "base" / "weights" / "7.pt")
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> runs.Data:
    return runs.Data.load(folder, folder)


def test_no_document_of_a_probe_is_trained_on(folder: Path, data: runs.Data) -> None:
    held = set(data.other.flatten().tolist()) | set(data.other_validation.flatten().tolist())
    dataset = _tuning.on_c4(folder, folder, TINY).dataset
    trained = {int(token) for row in range(len(dataset)) for token in dataset[row]["input_ids"]}
    assert trained
    assert not trained & held


def test_log_probabilities_are_those_of_the_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (2, 8), generator=generator)
    labels = torch.full((2, 8), -1)
    labels[:, 4:] = torch.tensor([[1], [0]])
    probe = ib.Probe.from_tokens(ids, labels={"preference": labels})
    model = TINY.model().eval()
    with torch.no_grad():
        found = _tuning.log_probabilities(model, _tuning.inputs_of(probe))
        logs = model(ids).logits.log_softmax(-1)
    expected = [sum(float(logs[row, at - 1, ids[row, at]]) for at in range(4, 8)) for row in range(2)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gain", [0.0, 2.0, -3.0])
def test_the_loss_of_dpo_is_of_the_gain_over_the_reference(gain: float) -> None:
    ids = torch.randint(0, 300, (1, 2, 8), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    model = TINY.model().eval()
    now = _tuning.log_probabilities(model, {name: each[0] for name, each in inputs.items()}).detach()
    reference = (now - torch.tensor([gain, 0.0]))[None]
    loss = _tuning.DPOTrainer.compute_loss(SimpleNamespace(beta=BETA), model, inputs | {"reference": reference})
    assert float(loss) == pytest.approx(math.log1p(math.exp(-BETA * gain)), rel=1e-4)


def test_a_dpo_run_has_all_that_the_tables_need(folder: Path, data: runs.Data) -> None:
    task = _tuning.on_pairs(folder, folder, TINY, beta=BETA, held_out=5)
    found = runs.train(TINY, data, folder / "tiny", task)
    assert found["step"] == [0, 2, TINY.steps]
    assert [found[f"{name}_{judge}"][0] for name in ("held", "seen") for judge in ("accuracy", "margin")] == [
        0.5,
        0,
    ] * 2
    assert found["seen_margin"][-1] > 0
    assert len(found["novels"]["held_preference/information_null_std"]) == 3
    assert not any("preference" in name for name in found["c4"])
    assert "| held margin |" in "\n".join(fine_tuning._preference(found))


def test_every_finished_run_is_in_the_tables() -> None:
    text = "\n".join(fine_tuning.report())
    finished = [path.stem for path in fine_tuning.RESULTS.glob("*.json") if path != fine_tuning.CONTROL]
    assert finished
    assert all(f"## {name}\n" in text for name in finished)
    assert np.isin(finished, [run.name for run in fine_tuning.RUNS]).all()
