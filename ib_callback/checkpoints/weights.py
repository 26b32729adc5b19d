"""Trained weights into a model that has none yet, whatever name its trainer has put in front of theirs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ib_callback.common.errors import ModelError

# What older versions of transformers saved although it follows from the configuration.
_CONSTANTS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")


def load_mapping(model: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Tensors by name into the parameters and buffers of a model.

    Args:
        model: whose names are those of the tensors, but for what stands in front of these.
        state: more than tensors may be in it.
        what: where they are from, for messages.

    Raises:
        ModelError: tensors that are missing, left over or of another shape.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    own = model.state_dict(keep_vars=True)
    names = matching(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, what)
    with torch.no_grad():
        for name, there in names.items():
            own[name].copy_(tensors[there])


def load_shards(model: nn.Module, folder: Path) -> None:
    """The shards of torch.distributed into a model, by one process, however many wrote them.

    Raises:
        ModelError: tensors that are missing, left over or of another shape.
    """
    from torch.distributed.checkpoint import FileSystemReader, load

    listed = FileSystemReader(folder).read_metadata().state_dict_metadata
    sizes = {name: tuple(entry.size) for name, entry in listed.items() if hasattr(entry, "size")}
    own = model.state_dict(keep_vars=True)
    names = matching(own, sizes, str(folder))
    state = {there: own[name].detach() for name, there in names.items()}
    with warnings.catch_warnings():
        # That there is one process alone is meant.
        warnings.simplefilter("ignore", UserWarning)
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    with torch.no_grad():
        for name, there in names.items():
            own[name].copy_(state[there])


def matching(own: Mapping[str, Tensor], there: Mapping[str, tuple[int, ...]], what: str) -> dict[str, str]:
    """By name of a model's tensors, the names of those that are to be put there.

    Trainers put something in front of all names, such as "model." or "state_dict.net.". Of tensors that share their
    memory one is enough.

    Args:
        own: of the model.
        there: shapes by name.
        what: where they are from, for messages.

    Raises:
        ModelError: tensors that are missing, left over or of another shape.
    """
    front = _front(own, there)
    names = {name: front + name for name in own if front + name in there}
    given = {own[name].data_ptr() for name in names if own[name].numel()}
    missing = [name for name in own if name not in names and own[name].data_ptr() not in given]
    other = [name for name, found in names.items() if tuple(own[name].shape) != there[found]]
    # A metric or a second network that a LightningModule holds beside the model is none of it.
    parts, taken = {name.split(".")[0] for name in own}, {*names.values()}
    rest = [name for name in there if name.startswith(front) and name not in taken and not name.endswith(_CONSTANTS)]
    left = [name for name in rest if name[len(front) :].split(".")[0] in parts]
    told = {"are missing": missing, "have another shape": other, "are left over": left}
    if any(told.values()):
        wrong = "; ".join(f"{len(names)} {how} ({_some(names)})" for how, names in told.items() if names)
        raise ModelError(f"{what}: expected the weights of this model, but {wrong}")
    return names


def _front(own: Collection[str], there: Collection[str]) -> str:
    """What stands in front of the names there: that with which most of one's own are found."""
    first = max(own, key=len, default="")
    fronts = [name[: len(name) - len(first)] for name in there if name == first or name.endswith(f".{first}")]
    return max(fronts, key=lambda front: sum(front + name in there for name in own), default="")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
