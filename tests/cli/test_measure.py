"""`ib-callback measure` on real small checkpoints, as a user calls it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import tiny_callback, tiny_model, tiny_probe, tiny_trainer
from tokenizers import Tokenizer, pre_tokenizers
from word_tokenizer import word_tokenizer

from ib_callback import Probe, Results, Trajectory
from ib_callback.cli.main import main

TOO_DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000
SMALL = ["--num-bins", "12", "--batch-size", "3"]


def spaced() -> Tokenizer:
    """Like `word_tokenizer`, but the spaces between words are tokens, too."""
    tokenizer = word_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    return tokenizer


def words(number: int, *, seed: int) -> str:
    chosen = torch.randint(10, (number,), generator=torch.Generator().manual_seed(seed))
    return " ".join("abcdefghij"[int(index)] for index in chosen)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of HuggingFace's Trainer, followed by the callback, with a checkpoint at every step it measured."""
    monkeypatch.chdir(tmp_path)
    callback = tiny_callback(every_n_steps=4)
    trainer = tiny_trainer(
        tmp_path / "run", [callback], steps=12, save_strategy="steps", save_steps=4, include_num_input_tokens_seen="all"
    )
    trainer.train()
    tiny_probe().save(tmp_path / "probe.safetensors")
    return tmp_path / "run"


def test_the_checkpoints_of_a_run_give_the_trajectory_of_the_callback(run, capsys):
    assert main(["measure", str(run), "-o", "r.jsonl", "--probe", "probe.safetensors", *SMALL, "--csv", "r.csv"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines()[1].split() == ["run", "gpt2", "7,808", "3", "0", "4", "to", "12", "256", "to", "768"]
    assert out.err.splitlines()[-2:] == ["ib-callback: written: r.jsonl", "ib-callback: written: r.csv"]
    followed = [point for point in Trajectory.load(run) if point.step in (4, 8, 12)]
    for point, callbacks in zip(Results.load("r.jsonl")["run"], followed, strict=True):
        assert point.step == callbacks.step
        assert point.orders == callbacks.orders
        assert point.views == callbacks.views
        assert point.loss == callbacks.loss
        assert point.settings == callbacks.settings
    with open("r.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "8", "12"]
    assert main(["plot", "r.jsonl", "-o", "run.svg"]) == 0
    names = sorted(path.name for path in Path.cwd().glob("*.svg"))
    assert names == ["run_layers.svg", "run_plane.svg", "run_steps.svg"]
    assert main(["measure", str(run), "-o", "r.jsonl", "--probe", "probe.safetensors", *SMALL]) == 0
    assert "3 of 3 checkpoints are already in r.jsonl" in capsys.readouterr().err
    assert len(Path("r.jsonl").read_text().splitlines()) == 3


def save(folder: str, tokenizer: Any, seed: int = 0) -> None:
    tiny_model(seed).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models of one tokenizer, one of another, documents that are long enough for one or for both, and pairs."""
    monkeypatch.chdir(tmp_path)
    save("a", word_tokenizer(), 0)
    save("b", word_tokenizer(), 1)
    save("other", spaced(), 2)
    texts = [words(16 if index % 2 else 9, seed=index) for index in range(8)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sides = {"prompt": 0, "chosen": 50, "rejected": 90}
    rows = [{side: words(5, seed=seed + i) for side, seed in sides.items()} for i in range(4)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


DOCUMENTS = ["--documents", "texts.jsonl", "--num-sequences", "4", "--max-length", "16", "--order", "token", *SMALL]


@pytest.mark.parametrize("shard", [None, "1/3", "3/3"])
def test_each_model_has_its_own_probe_of_the_same_documents(models, shard):
    share = [] if shard is None else ["--shard", shard]
    assert main(["measure", "a", "b", "other", "-o", "r.jsonl", *DOCUMENTS, *share]) == 0
    results = Results.load("r.jsonl")
    texts = [json.loads(line)["text"] for line in Path("texts.jsonl").read_text().splitlines()]
    tokenizers = {"a": word_tokenizer(), "b": word_tokenizer(), "other": spaced()}
    expected = Probe.for_tokenizers(texts, tokenizers, num_sequences=4, max_length=16)
    assert len(expected["other"]) == 4
    assert [*results] == {None: ["a", "b", "other"], "1/3": ["a"], "3/3": ["other"]}[shard]
    for name, (point,) in results.items():
        assert point.settings["probe"] == expected[name].fingerprint
        assert point.settings["documents"] == expected[name].source["documents"]


def test_features_are_measured_on_pairs_written_alike_for_all(models):
    named = ["--feature-probe", "answers=pairs.jsonl"]
    assert main(["measure", "a", "-o", "r.jsonl", *DOCUMENTS, *named]) == 0
    (point,) = Results.load("r.jsonl")["a"]
    assert [*point.features] == ["answers_preference"]
    pairs = Probe.from_preferences(Path("pairs.jsonl"), word_tokenizer(), num_sequences=4, max_length=16)
    assert point.settings["feature_probes"] == {"answers_preference": pairs.fingerprint}


def test_one_probe_of_token_ids_is_for_all(models):
    tiny_probe().save("probe.safetensors")
    on = ["--probe", "probe.safetensors", "--order", "token", *SMALL]
    assert main(["measure", "a", "other", "-o", "r.jsonl", *on]) == 0
    assert {p.settings["probe"] for t in Results.load("r.jsonl").values() for p in t} == {tiny_probe().fingerprint}


@pytest.mark.parametrize(
    ("options", "setting", "value"),
    [
        (["--seed", "3"], "seed", 3),
        (["--temperature", "0.5"], "temperature", 0.5),
        (["--weighting", "uniform"], "weighting", "uniform"),
        (["--layer", "blocks"], "layers", ["transformer.h.0", "transformer.h.1"]),
        (["--layer", "transformer.h.1"], "layers", ["transformer.h.1"]),
        (["--center"], "center", True),
        (["--draws", "2"], "draws", 2),
        (["--companion", "rankme"], "companions/last", ["rankme"]),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--preset", "paper-calibrated", "--num-bins", "100"], "weighting", "uniform"),
        (["--baseline", "no", "--no-null", "--loss", "no", "--standard-errors"], "readout", {"bins": 100}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_are_the_keywords_of_a_meter(models, options, setting, value):
    assert main(["measure", "a", "-o", "r.jsonl", *DOCUMENTS, *options]) == 0
    (point,) = Results.load("r.jsonl")["a"]
    if setting == "readout":
        assert (point.loss, point["token"].complexity_null, point["token"].complexity_baseline) == (None, None, None)
        assert point["token"].complexity_se > 0
    else:
        assert point.settings[setting] == value


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_configuration_that_is_nested_too_deep_has_a_cure(models, capsys, file):
    Path("a", file).write_text(TOO_DEEP)
    assert main(["measure", "a", "-o", "r.jsonl", *DOCUMENTS, "--tokenizer", "b/tokenizer.json"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ib-callback: not measured: a: ModelError: a: cannot be loaded. One of its JSON files")
    assert line.endswith("Save the model again, or download it again")


def test_a_broken_checkpoint_is_named_at_the_end(models, capsys):
    for step, seed in ((10, 0), (20, 1)):
        tiny_model(seed).save_pretrained(f"run/checkpoint-{step}")
    Path("run/checkpoint-10/model.safetensors").write_bytes(b"torn")
    assert main(["measure", "run", "-o", "r.jsonl", *DOCUMENTS, "--tokenizer", "a/tokenizer.json"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("ib-callback: not measured: run checkpoint-10: ")
    assert Results.load("r.jsonl")["run"].steps == [10, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--order", "token"], "expected either --probe FILE or --documents"),
        (["a", *DOCUMENTS, "--probe", "probe.safetensors"], "expected either --probe FILE or --documents"),
        (["bare", *DOCUMENTS], "bare: has no tokenizer in bare, .*Name one with --tokenizer"),
        (["a", *DOCUMENTS, "--text-column", "body"], "expected a column 'body', got the columns text"),
        (["a", *DOCUMENTS, "--documents", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["a", *DOCUMENTS, "--increments", "20"], "--increments: expected at least two orders, got only token"),
        (["a", *DOCUMENTS, "--num-bins", "1"], "num_bins: expected an integer of at least 2"),
        (["a", *DOCUMENTS, "--tokenizer", "./nowhere"], "--tokenizer ./nowhere: cannot be loaded"),
        (["a", *DOCUMENTS, "--config", "./nowhere"], "--config ./nowhere: cannot be loaded"),
        (["a", *DOCUMENTS, "--config", "deep"], "--config deep: cannot be loaded.*nested too deep. Save the model"),
        (["a", *DOCUMENTS, "--factory", "tiny_hf"], "--factory: expected module:function, got 'tiny_hf'"),
        (["a", *DOCUMENTS, "--factory", "tiny_hf:nothing"], "--factory tiny_hf:nothing: cannot be imported"),
        (["a", *DOCUMENTS, "--factory", "damaged:make"], "--factory damaged:make: cannot be imported .SyntaxError"),
        (["a", *DOCUMENTS, "--factory", "tiny_hf:LENGTH"], "--factory tiny_hf:LENGTH: expected a function or a class"),
        (["--watch", ".", *DOCUMENTS, "--factory", "tiny_hf:nothing"], "--factory tiny_hf:nothing: cannot be imported"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_nothing_is_written(models, capsys, arguments, message):
    save("bare", None)
    save("deep", None)
    Path("deep/config.json").write_text(TOO_DEEP)
    Path("damaged.py").write_text("def make(:")
    assert main(["measure", *arguments, *([] if "--watch" in arguments else ["-o", "r.jsonl"])]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not Path("r.jsonl").exists()
