"""Load trained weights into a model, with any prefix that a trainer has put in front of their names."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ib_callback.common.errors import ModelError

# Tensors that older versions of transformers saved although they follow from the configuration.
_CONSTANTS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")


def load_mapping(model: nn.Module, state: Mapping[str, Any], what: str, dtype: torch.dtype | None = None) -> None:
    """Load tensors by name into the parameters and buffers of a model.

    Args:
        model: a model with the same names, apart from a prefix.
        state: tensors by name; it may contain other things too.
        what: the source of the tensors, for messages.
        dtype: dtype of the parameters; None: that of most of the weights.

    Raises:
        ModelError: tensors are missing, left over or of another shape.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    own = model.state_dict(keep_vars=True)
    names = matching(own, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, what)
    _cast(model, dtype, ((tensors[there].dtype, tensors[there].numel()) for there in names.values()))
    with torch.no_grad():
        for name, there in names.items():
            own[name].copy_(tensors[there])


def load_shards(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Load shards of torch.distributed into a model with one process, even if many processes wrote them.

    Args:
        model: as for `load_mapping`.
        folder: folder of the shards.
        dtype: as for `load_mapping`.

    Raises:
        ModelError: tensors are missing, left over or of another shape.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    listed = {name: entry for name, entry in metadata.items() if isinstance(entry, TensorStorageMetadata)}
    sizes = {name: tuple(entry.size) for name, entry in listed.items()}
    own = model.state_dict(keep_vars=True)
    names = matching(own, sizes, str(folder))
    stored = ((listed[there].properties.dtype, math.prod(sizes[there])) for there in names.values())
    _cast(model, dtype, stored)
    state = {there: own[name].detach() for name, there in names.items()}
    with warnings.catch_warnings():
        # torch warns that there is only one process, which is intended here.
        warnings.simplefilter("ignore", UserWarning)
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    with torch.no_grad():
        for name, there in names.items():
            own[name].copy_(state[there])


def matching(own: Mapping[str, Tensor], there: Mapping[str, tuple[int, ...]], what: str) -> dict[str, str]:
    """{name of a tensor of the model: name of the saved tensor for it}.

    Trainers put a prefix in front of all names, such as "model." or "state_dict.net.". If tensors of the model share
    their memory, one saved tensor is enough for them.

    Args:
        own: tensors of the model by name.
        there: shapes of the saved tensors by name.
        what: the source of the saved tensors, for messages.

    Raises:
        ModelError: tensors are missing, left over or of another shape, or there are several sets of them.
    """
    front = _front(own, there, what)
    names = {name: front + name for name in own if front + name in there}
    given = {own[name].data_ptr() for name in names if own[name].numel()}
    missing = [name for name in own if name not in names and own[name].data_ptr() not in given]
    other = [name for name, found in names.items() if tuple(own[name].shape) != there[found]]
    # A metric or a second network of a LightningModule beside the model does not count as left over.
    parts, taken = {name.split(".")[0] for name in own}, {*names.values()}
    rest = [name for name in there if name.startswith(front) and name not in taken and not name.endswith(_CONSTANTS)]
    left = [name for name in rest if name[len(front) :].split(".")[0] in parts]
    told = {"are missing": missing, "have another shape": other, "are not part of the model": left}
    if any(told.values()):
        wrong = "; ".join(f"{len(names)} {how} ({_some(names)})" for how, names in told.items() if names)
        raise ModelError(f"{what}: expected the weights of this model, but {wrong}")
    return names


def _front(own: Collection[str], there: Collection[str], what: str) -> str:
    """The prefix of the saved names: the one with which most names of the model are found."""
    first = max(own, key=len, default="")
    fronts = [name[: len(name) - len(first)] for name in there if name == first or name.endswith(f".{first}")]
    found = {front: sum(front + name in there for name in own) for front in fronts}
    most = max(found.values(), default=0)
    best = [front for front, number in found.items() if number == most]
    if len(best) > 1 and 2 * most > len(own):
        # For example, the weights of a policy and of its reference, or an average of weights beside them.
        raise ModelError(
            f"{what}: expected the weights of this model once, got {len(best)} sets of them, whose names begin with "
            f"{_some(best)}. Save the set that you want to a separate file"
        )
    return best[0] if best else ""


def _cast(model: nn.Module, dtype: torch.dtype | None, stored: Iterable[tuple[torch.dtype, int]]) -> None:
    """Cast the parameters to a dtype; None: that of most of the stored numbers. Buffers keep their dtype."""
    numbers: Counter[torch.dtype] = Counter()
    for each, number in stored:
        numbers[each] += number if each.is_floating_point else 0
    wanted = dtype if dtype is not None or not +numbers else numbers.most_common(1)[0][0]
    for parameter in model.parameters() if wanted is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
