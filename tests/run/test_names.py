from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import tiny_model, tiny_probe, tiny_trainer

import ib_callback as ib
from ib_callback.hf import IBCallback as HfCallback
from ib_callback.lightning import IBCallback as LightningCallback
from ib_callback.results.metrics import VIEWS
from ib_callback.run.config import RunConfig
from ib_callback.run.names import Names
from ib_callback.run.trackers import HEADLINE


@pytest.mark.parametrize(
    ("prefix", "says"),
    [("code", 'a slash at its end, such as "code/"'), ("a/b/", "one word"), ("", "one word"), ("train/", "of its own")],
)
def test_a_prefix_that_cannot_be_one(prefix: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"prefix: expected .*{says}.*got {prefix!r}|{says}"):
        RunConfig(prefix=prefix)


def test_a_prefix_is_a_text() -> None:
    with pytest.raises(TypeError, match=r'prefix: expected a text such as "ib/" or "code/", got 3\.'):
        RunConfig(prefix=3)  # type: ignore[arg-type]


def test_no_file_is_shared() -> None:
    parts = [name for name in vars(Names) if isinstance(vars(Names)[name], property)]
    files = [name for name in parts if name not in ("stem", "is_default", "replaced")]
    ours, others = ({getattr(Names(prefix), name) for name in files} for prefix in ("ib/", "code/"))
    assert len(ours) == len(others) == len(files) == 7
    assert not ours & others
    assert not any(re.fullmatch(Names("code/").replaced, name) for name in ours)


def test_a_prefix_is_in_keys_evaluations_and_states(tmp_path: Path) -> None:
    callbacks = [
        HfCallback(tiny_probe(), num_bins=12, log_plane=False, every_n_steps=2, orders="token", prefix=prefix)
        for prefix in ("ib/", "code/")
    ]
    trainer = tiny_trainer(
        tmp_path, callbacks, steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        metric_for_best_model="code_complexity", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    evaluation = trainer.evaluate()
    assert evaluation["eval_code_complexity"] == evaluation["eval_ib_complexity"] == trainer.state.best_metric
    for prefix, callback in zip(("ib/", "code/"), callbacks, strict=True):
        rows = [row for row in trainer.state.log_history if f"{prefix}complexity" in row]
        assert [row[f"{prefix}complexity"] for row in rows] == callback.trajectory.values("complexity")
    assert {"ib_callback", "ib_callback[code/]"} <= set(trainer.state.stateful_callbacks)


# --- the tables in the docstrings


def keys_of(documented: type) -> list[str]:
    """The keys in the first column of the table."""
    rows = re.findall(r"^    \| (`ib/.*?) \| ", documented.__doc__ or "", flags=re.MULTILINE)
    return [key for row in rows for key in re.findall("`(.+?)`", row)]


PICTURES = {"ib/plane", "ib/over_steps", "ib/layers"}


def test_both_callbacks_have_the_same_table() -> None:
    assert keys_of(HfCallback) == keys_of(LightningCallback)
    assert {f"ib/{name}" for name in HEADLINE} <= set(keys_of(HfCallback))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every key of a small run that has a feature, long documents, bytes, tokens and a rule that does not act."""
    ids = torch.randint(0, 60, (4, 96), generator=torch.Generator().manual_seed(7))
    kinds = {"kind": torch.tensor([0, 1, 0, 1])[:, None].expand(4, 96).contiguous()}
    probe = ib.Probe.from_tokens(ids, labels=kinds, num_bytes=4 * 96 * 3)
    model = tiny_model()
    model.transformer.wpe = torch.nn.Embedding(96, 16)
    model.config.n_positions = model.config.max_position_embeddings = 96
    rule: Any = ib.PlateauStopping(act=False)
    with ib.Run(
        ib.Meter(probe, orders=("token", "bigram"), num_bins=12), output_dir=tmp_path_factory.mktemp("run"),
        early_stopping=rule, select_from=0, tokens_per_step=64, log_plane=False, console=False,
    ) as run:  # fmt: skip
        run.step(model, 0, loss=4.0)
        point = run.trajectory[-1]
    # Random text has no local information, of which the score is made.
    of_predictions = {**point.prediction, "token": replace(point.prediction["token"], score_local=0.1)}
    return set(run.logged(replace(point, views={**point.views, "prediction": of_predictions})))


def test_the_table_has_the_keys_that_are_logged(logged: set[str]) -> None:
    parts = {
        "<order>": "(token|bigram)",
        "<view>": f"({'|'.join(VIEWS)})",
        "<feature>": "kind",
        "<number>": r"[a-z_/]+",
    }
    patterns = {}
    for key in set(keys_of(HfCallback)) - PICTURES:
        pattern = key.replace("<view>/<number>", "<view>/[a-z_]+").replace("<order>/<number>", "<order>/[a-z_]+")
        for name, stands_for in parts.items():
            pattern = pattern.replace(name, stands_for)
        patterns[key] = pattern
    unused = [key for key, pattern in patterns.items() if not any(re.fullmatch(pattern, name) for name in logged)]
    assert unused == []
    unknown = [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns.values())]
    assert unknown == []


def test_the_headline_comes_first_and_in_one_section(logged: set[str]) -> None:
    assert {f"ib/{name}" for name in HEADLINE} <= logged
    assert not any("/" in name for name in HEADLINE)
