"""Load models from a folder, a GGUF file, a file of torch, or shards of torch.distributed."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ib_callback.checkpoints.hub import TOO_DEEP, by_name
from ib_callback.checkpoints.local import gguf_in, shards_in
from ib_callback.checkpoints.weights import load_mapping, load_shards
from ib_callback.common.errors import ModelError
from ib_callback.common.json_lines import is_too_deep
from ib_callback.common.messages import describe
from ib_callback.common.optional import is_installed, require
from ib_callback.measuring.model.access import named_by_model, transformers_models

# Keys under which files of torch keep the weights, if they hold other things too.
_STATES = ("state_dict", "model_state_dict", "model")
_HYPER_PARAMETERS = "hyper_parameters"
_CONFIG = "config.json"
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded.

    Attributes:
        factory: "module:name" of a function without arguments, or of a class that is called with the file's
            `hyper_parameters` if it has any. It is needed for weights without a configuration, such as Lightning's.
        config: a folder or a name on the hub with the configuration, for weights without one.
        dtype: "auto", the dtype of the weights, or the name of a torch dtype.
        device: device for the model.
        device_map: as for transformers, instead of `device`: "auto" spreads a model over GPUs, memory and disk.
        gguf: which of several GGUF files to use, as a glob.
        allow_pickle: whether to load files that `torch.load` does not consider safe; such files can run any code.
        trust_remote_code: as for transformers.
        seed: seed of the weights of untrained models.
    """

    factory: str | None = None
    config: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    device_map: str | dict[str, Any] | None = None
    gguf: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _dtype(self.dtype)
        try:  # checked now, because otherwise every checkpoint would be fetched in vain
            torch.empty(0, device=self.device)
        except Exception as error:  # torch raises errors of any kind
            raise ModelError(
                f"--device: expected a device of this machine, such as cpu or cuda:0, got {self.device!r} "
                f"({describe(error).splitlines()[0]})"
            ) from error

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype; None: that of the weights."""
        return None if self.dtype == "auto" else _dtype(self.dtype)

    @cached_property
    def given_config(self) -> Any:
        """The configuration that `config` names, loaded once; None without `config`.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self.config is None:
            return None
        load = partial(_auto_config, self.config, trust_remote_code=self.trust_remote_code)
        return by_name(f"--config {self.config}", self.config, load, _CONFIG)

    def check(self) -> None:
        """Check that everything named exists; otherwise every checkpoint would be fetched and then fail.

        Raises:
            ValueError: the configuration cannot be loaded, or the factory cannot be imported.
            ImportError: a package is needed that is not installed.
        """
        _ = self.given_config
        if self.factory is not None:
            _imported(self.factory)


@contextmanager
def loaded(path: Path, loading: Loading, *, untrained: bool = False) -> Iterator[nn.Module]:
    """The model at a path, in evaluation mode, for as long as the body runs.

    Args:
        path: a folder or a file.
        loading: how to load it.
        untrained: whether to use only the configuration, with new random weights that depend on the seed.

    Raises:
        ModelError: weights are missing, left over or of another shape; the path holds nothing known; or the
            configuration is nested too deep.
        Exception: any error that transformers and torch raise on damaged files.
    """
    with tempfile.TemporaryDirectory(prefix="ib_callback_offload_") as folder:
        try:
            model = _untrained(path, loading) if untrained else _trained(path, loading, folder)
        except RecursionError as error:
            if is_too_deep(error):
                raise ModelError(f"{path}: cannot be loaded. {TOO_DEEP}") from error
            raise
        if loading.device_map is None:
            model.to(loading.device)
        yield _inside(model).eval()


def num_parameters(model: nn.Module) -> int:
    """The number of parameters; shared parameters count once."""
    number = sum(parameter.numel() for parameter in model.parameters())
    tables = [getattr(named_by_model(model, f"get_{side}_embeddings"), "weight", None) for side in ("input", "output")]
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) and tables[0] is not tables[1]:
        # If accelerate offloads a model, one tensor in two places appears as two tensors.
        number -= sum(table.numel() for table in tables[1:] if table is not None and table.is_meta)
    return number


def family_of(model: nn.Module) -> str | None:
    """The architecture, by its name in transformers."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    return family if isinstance(family, str) and family else None


def _trained(path: Path, loading: Loading, folder: str) -> nn.Module:
    shards = shards_in(path)
    if shards is not None:
        _check_no_map(loading, path)
        model = _skeleton(path, loading, {})
        load_shards(_inside(model), shards, loading.torch_dtype)
        return model
    gguf = gguf_in(path, loading.gguf)
    if gguf is not None:
        return _from_transformers(gguf.parent, loading, folder, gguf_file=gguf.name)
    if path.is_dir():
        # For a folder with neither, the error of transformers says which files it looked for.
        return _from_transformers(path, loading, folder)
    _check_no_map(loading, path)
    content = _read(path, allow_pickle=loading.allow_pickle)
    state = next((content[name] for name in _STATES if isinstance(content.get(name), Mapping)), content)
    model = _skeleton(path, loading, content.get(_HYPER_PARAMETERS))
    load_mapping(_inside(model), state, str(path), loading.torch_dtype)
    return model


def _untrained(path: Path, loading: Loading) -> nn.Module:
    with _seeded(loading.seed):
        gguf = gguf_in(path, loading.gguf) if shards_in(path) is None else None
        if gguf is not None:
            return _from_config(_auto_config(gguf.parent, gguf_file=gguf.name), loading)
        content = {} if path.is_dir() else _read(path, allow_pickle=loading.allow_pickle)
        return _skeleton(path, loading, content.get(_HYPER_PARAMETERS))


def _from_transformers(path: Path, loading: Loading, folder: str, **keywords: Any) -> nn.Module:
    transformers = _transformers()
    if "gguf_file" in keywords and not is_installed("gguf"):
        raise ImportError('Reading a GGUF file needs the package "gguf", which is not installed: pip install gguf')
    keywords |= {"dtype": _dtype(loading.dtype), "trust_remote_code": loading.trust_remote_code}
    if loading.device_map is not None:
        keywords |= {"device_map": loading.device_map, "offload_folder": folder}
    kind = transformers.AutoModelForCausalLM
    if not keywords.get("gguf_file") and (path / _CONFIG).is_file():
        kind = _class_of(_auto_config(path, trust_remote_code=loading.trust_remote_code))
    model, found = kind.from_pretrained(path, output_loading_info=True, **keywords)
    wrong = {name: sorted(map(str, found.get(name) or ())) for name in ("missing_keys", "mismatched_keys")}
    if any(wrong.values()):
        # transformers fills missing weights with random numbers, and only its log says so.
        missing = [*wrong["missing_keys"], *wrong["mismatched_keys"]]
        raise ModelError(
            f"{path}: expected weights of every parameter of {type(model).__name__}, but they are missing or have the "
            f"wrong shape for {len(missing)}: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        )
    _check_all_layers(model, found.get("unexpected_keys") or (), path)
    return model


def _check_all_layers(model: nn.Module, left_over: Iterable[str], path: Path) -> None:
    """Check that no weights belong to layers beyond the configured ones; other extra weights (of a head) are fine."""
    kinds = {_NUMBER.sub(".N.", name) for name, _ in model.named_parameters()}
    modules = {name for name, _ in model.named_modules()}
    more = [
        name
        for name in sorted(map(str, left_over))
        if _NUMBER.sub(".N.", name) in kinds
        and any(name[: match.end() - 1] not in modules for match in _NUMBER.finditer(name))
    ]
    if more:
        raise ModelError(
            f"{path}: expected weights for the layers of its configuration, but it also has weights for other layers: "
            f"{', '.join(more[:5])}{', …' if len(more) > 5 else ''}"
        )


def _skeleton(path: Path, loading: Loading, hyper_parameters: Any) -> nn.Module:
    """The model without its trained weights."""
    if loading.factory is not None:
        return _made(loading.factory, hyper_parameters)
    first = path if path.is_dir() else path.parent
    near = [folder for folder in (first, first.parent, first.parent.parent) if (folder / _CONFIG).is_file()]
    if loading.config is not None:
        return _from_config(copy.deepcopy(loading.given_config), loading)
    if not near:
        raise ModelError(
            f"{path}: has weights but no configuration. Give --factory module:function, a function that makes the "
            "model. Or give --config, a folder or a name on the hub with the config.json of the model"
        )
    return _from_config(_auto_config(near[0], trust_remote_code=loading.trust_remote_code), loading)


def _from_config(config: Any, loading: Loading) -> nn.Module:
    kind, keywords = _class_of(config), {}
    dtype = _dtype(loading.dtype)
    dtype = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else dtype
    if hasattr(kind, "from_config"):
        keywords = {"trust_remote_code": loading.trust_remote_code}
        return kind.from_config(config, dtype=dtype, **keywords)
    return kind(config).to(dtype)


def _class_of(config: Any) -> Any:
    """The class whose weights were saved, if transformers has it."""
    transformers = _transformers()
    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, str(names[0]), None)
    return found if inspect.isclass(found) else transformers.AutoModelForCausalLM


def _auto_config(place: str | Path, **keywords: Any) -> Any:
    return _transformers().AutoConfig.from_pretrained(place, **keywords)


def _made(factory: str, hyper_parameters: Any) -> nn.Module:
    make = _imported(factory)
    given = dict(hyper_parameters) if inspect.isclass(make) and isinstance(hyper_parameters, Mapping) else {}
    model = make(**given)
    if not isinstance(model, nn.Module):
        raise ModelError(f"--factory {factory}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _imported(factory: str) -> Any:
    module, _, name = factory.partition(":")
    if not module or not name:
        raise ModelError(f"--factory: expected module:function, got {factory!r}")
    # As with `python -m`, a file in the working directory can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make: Any = importlib.import_module(module)
        for part in name.split("."):
            make = getattr(make, part)
    except Exception as error:  # any error of the user's module
        raise ModelError(f"--factory {factory}: cannot be imported ({describe(error)})") from error
    if not callable(make):
        raise ModelError(f"--factory {factory}: expected a function or a class, got {type(make).__name__}")
    return make


def _inside(model: nn.Module) -> nn.Module:
    """The only transformers model inside another module; Lightning's callback measures the same one."""
    found = list(transformers_models(model).values())
    return found[0] if len(found) == 1 else model


def _read(path: Path, *, allow_pickle: bool) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: holds more than tensors and plain values, or is damaged ({describe(error).splitlines()[0]}). If "
            "you trust whoever wrote the file, load it with --allow-pickle, which lets the file run any code"
        ) from error
    except (EOFError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{path}: expected a complete file of weights, got one that cannot be read "
            f"({describe(error).splitlines()[0]}). The file may be incomplete: save it again, or move it away"
        ) from error
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: expected a dict of weights, or a dict that contains one, got {type(content).__name__}"
        )
    return content


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_no_map(loading: Loading, path: Path) -> None:
    if loading.device_map is not None:
        raise ModelError(
            f"{path}: --device-map works only for folders that transformers can load, got weights without a "
            "configuration. Convert the weights, or leave --device-map out"
        )


def _dtype(name: str) -> Any:
    if name == "auto":
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"--dtype: expected auto, float32, bfloat16, float16 or another dtype of torch, got {name!r}")
    return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU, where weights are drawn, and restore their state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _transformers() -> Any:
    return require("transformers", extra="hf", purpose="Loading a model")
