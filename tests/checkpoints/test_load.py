from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_lightning
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tiny_hf import same_weights, tiny_model, tiny_probe, weights
from torch import nn

from ib_callback import Meter
from ib_callback.checkpoints import load
from ib_callback.checkpoints.load import Loading, loaded, num_parameters
from ib_callback.checkpoints.weights import matching
from ib_callback.common.errors import ModelError


def weights_at(path: Path, *, untrained: bool = False, **options: Any) -> dict[str, torch.Tensor]:
    with loaded(path, Loading(**options), untrained=untrained) as model:
        assert not model.training
        return weights(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save_shards(state: dict[str, Any], path: Path) -> None:
    """As accelerate's `save_fsdp_model` and Lightning's FSDP strategy do, of a model that is not split."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=True)


# --- what training leaves


def test_a_folder_of_transformers(folder):
    assert same_weights(weights_at(folder), weights(tiny_model(1)))
    assert {value.dtype for value in weights_at(folder, dtype="bfloat16").values()} == {torch.bfloat16}
    with loaded(folder, Loading()) as model:
        assert (type(model).__name__, load.family_of(model)) == ("GPT2LMHeadModel", "gpt2")
        # The head is the embedding.
        assert num_parameters(model) == sum(p.numel() for p in tiny_model().parameters())


def test_shards_of_a_trainer_and_of_lightning(folder, tmp_path):
    expected = weights(tiny_model(2))
    trainer = tmp_path / "run" / "checkpoint-5"
    save_shards({"model": expected}, trainer / "pytorch_model_fsdp_0")
    (tmp_path / "run" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert same_weights(weights_at(trainer), expected)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has weights but no configuration. Give --factory module:function"):
        weights_at(trainer)
    assert same_weights(weights_at(trainer, config=str(folder)), expected)
    bare = tmp_path / "bare"
    save_shards({f"transformer.{k}": v for k, v in tiny_model(3).transformer.state_dict().items()}, bare)
    # The head shares its memory with an embedding that is there.
    assert same_weights(weights_at(bare, config=str(folder)), weights(tiny_model(3)))
    sharded = tmp_path / "step=7.ckpt"
    module = tiny_lightning.tiny_module(model=None)
    save_shards({"model": {f"net.{name}": value for name, value in expected.items()}}, sharded)
    torch.save({"global_step": 7}, sharded / "meta.pt")
    assert same_weights(weights_at(sharded, factory="tiny_lightning:tiny_module"), expected)
    assert not same_weights(weights(module.net), expected)


def test_a_checkpoint_of_lightning(tmp_path):
    module = tiny_lightning.tiny_module()
    trainer = tiny_lightning.tiny_trainer(
        tmp_path, [tiny_lightning.saving(tmp_path, 2)], steps=2, enable_checkpointing=True
    )
    trainer.fit(module)
    (path,) = tmp_path.rglob("*.ckpt")
    assert same_weights(weights_at(path, factory="tiny_lightning:tiny_module"), weights(module.net))
    with pytest.raises(ModelError, match=r"--factory tiny_lightning:nothing: cannot be imported"):
        weights_at(path, factory="tiny_lightning:nothing")
    with pytest.raises(ModelError, match=r"--factory collections:Counter: expected a torch.nn.Module, got Counter"):
        weights_at(path, factory="collections:Counter")
    with pytest.raises(ModelError, match=r"--factory: expected module:function, got 'tiny_lightning'"):
        weights_at(path, factory="tiny_lightning")


class Sized(nn.Module):
    """Made of the hyperparameters in the file."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2)


def test_a_class_is_made_of_the_hyperparameters(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_lightning, "Sized", Sized, raising=False)
    state = Sized(5).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": {"width": 5}}, tmp_path / "a.ckpt")
    assert same_weights(weights_at(tmp_path / "a.ckpt", factory="tiny_lightning:Sized"), state)


@pytest.mark.parametrize("front", ["", "module.", "_orig_mod.", "net._orig_mod."])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_files_of_own_loops(folder, tmp_path, front, key):
    expected = weights(tiny_model(4))
    state = {front + name: value for name, value in expected.items()}
    torch.save(state if key is None else {key: state, "step": 3, "optimizer": {"state": {}}}, tmp_path / "a.pt")
    assert same_weights(weights_at(tmp_path / "a.pt", config=str(folder)), expected)


@pytest.mark.parametrize("place", [{"config": "bf16"}, {"factory": "tiny_hf:tiny_model"}])
@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("float16", torch.float16)])
def test_weights_without_a_configuration_keep_their_dtype_or_have_the_one_asked_for(
    folder, tmp_path, monkeypatch, place, dtype, expected
):
    monkeypatch.chdir(tmp_path)
    folder.rename("bf16")
    config = json.loads(Path("bf16/config.json").read_text())
    Path("bf16/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    state = weights(tiny_model(4))
    torch.save(state, "a.pt")
    save_shards(state, tmp_path / "shards")
    for name in ("a.pt", "shards"):
        loaded_ones = weights_at(Path(name), dtype=dtype, **place)
        assert same_weights(loaded_ones, {name: value.to(expected) for name, value in state.items()})


def test_files_that_can_run_code_are_refused(folder, tmp_path):
    torch.save({"model": weights(tiny_model(4)), "args": SimpleNamespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"holds more than tensors and plain values.*--allow-pickle"):
        weights_at(tmp_path / "a.pt", config=str(folder))
    assert same_weights(weights_at(tmp_path / "a.pt", config=str(folder), allow_pickle=True), weights(tiny_model(4)))


@pytest.mark.parametrize("where", [{"h.0": "disk"}, {"wte": "disk", "wpe": "disk", "h.1": "disk", "ln_f": "disk"}])
def test_a_model_that_is_partly_on_the_disk_is_measured_as_one_in_memory(folder, where):
    parts = {name: where.get(name, "cpu") for name in ("wte", "wpe", "h.0", "h.1", "ln_f")}
    spread = {f"transformer.{name}": place for name, place in parts.items()} | {"lm_head": parts["wte"]}
    meter = Meter(tiny_probe(), num_bins=12)
    with loaded(folder, Loading(device_map=spread)) as model, loaded(folder, Loading()) as whole:
        assert any(parameter.is_meta for parameter in model.parameters())
        found, expected = meter.measure(model), meter.measure(whole)
        assert (found.orders, found.views, found.loss) == (expected.orders, expected.views, expected.loss)
        assert num_parameters(model) == num_parameters(whole)


# --- what is wrong with it


def changed(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["transformer.h.1.attn.c_proj.weight"]


def cut(state: dict[str, torch.Tensor]) -> None:
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][:3].clone()


@pytest.mark.parametrize("change", [drop, cut])
def test_weights_that_do_not_fit_are_never_drawn_at_random(folder, change):
    changed(folder, change)
    with pytest.raises((ModelError, RuntimeError), match=r"c_proj\.weight|wpe\.weight|size mismatch|mismatch"):
        weights_at(folder)


def test_a_torn_file_is_an_error(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(Exception, match=r"header|incomplete|deserializ"):
        weights_at(folder)


def test_a_torn_file_of_torch_is_said_to_be_one(folder, tmp_path):
    torch.save(weights(tiny_model(4)), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for size in (0, 100, len(content) // 2):
        (tmp_path / "torn.pt").write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"torn\.pt: .*(cannot be read|is damaged)"):
            weights_at(tmp_path / "torn.pt", config=str(folder))


OWN = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4)}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"a.weight": (2, 3)}, r"1 are missing \(b\.weight\)"),
        ({"x.a.weight": (2, 3), "x.b.weight": (5,)}, r"1 have another shape \(b\.weight\)"),
        ({"a.weight": (2, 3), "b.weight": (4,), "a.bias": (2,)}, r"1 are not part of the model \(a\.bias\)"),
        ({"other": (1,)}, r"2 are missing \(a\.weight, b\.weight\)"),
    ],
)
def test_weights_of_another_model_are_refused(there, message):
    with pytest.raises(ModelError, match=rf"^here: expected the weights of this model, but {message}$"):
        matching(OWN, there, "here")


def test_of_two_sets_of_weights_none_is_chosen():
    there = {f"{front}.{name}": tuple(value.shape) for front in ("policy", "reference") for name, value in OWN.items()}
    with pytest.raises(ModelError, match=r"got 2 sets of them, whose names begin with policy\., reference\."):
        matching(OWN, there, "here")


def test_weights_of_more_layers_than_the_configuration_has_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(ModelError, match=r"expected weights for the layers of its configuration, but .*h\.1\."):
        weights_at(folder)


def test_a_device_is_one_that_is_here():
    with pytest.raises(ModelError, match=r"--device: expected a device of this machine, .*cuda:0, got 'tpu9'"):
        Loading(device="tpu9")


def test_what_lies_beside_the_model_is_left_alone():
    there = {"net.a.weight": (2, 3), "net.b.weight": (4,), "metric.total": (1,), "net.rotary_emb.inv_freq": (9,)}
    assert matching(OWN, there, "here") == {"a.weight": "net.a.weight", "b.weight": "net.b.weight"}


# --- untrained models, GGUF


def test_an_untrained_model_is_the_same_for_the_same_seed(folder):
    before = torch.get_rng_state()
    first, again, other = (weights_at(folder, untrained=True, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert not same_weights(first, weights_at(folder))
    assert first.keys() == weights_at(folder).keys()


@pytest.fixture
def quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("small-Q4.gguf", "small-Q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    monkeypatch.setattr(load, "is_installed", lambda _: False)
    return tmp_path


def test_of_several_gguf_files_one_has_to_be_named(quantised):
    with pytest.raises(ModelError, match=r"expected one GGUF file, got 2: small-Q4\.gguf, small-Q8\.gguf.*--gguf"):
        weights_at(quantised)
    for path, options in ((quantised, {"gguf": "*Q8*"}), (quantised / "small-Q4.gguf", {})):
        with pytest.raises(ImportError, match='the package "gguf", which is not installed: pip install gguf'):
            weights_at(path, **options)


@pytest.mark.parametrize("name", ["half", "float99", "Tensor"])
def test_a_dtype_is_one_of_torch(folder, name):
    if name == "half":
        assert weights_at(folder, dtype=name)
    else:
        with pytest.raises(ModelError, match=f"--dtype: expected auto, float32, .*got '{name}'"):
            weights_at(folder, dtype=name)
