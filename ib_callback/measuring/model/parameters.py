"""Parameters of a model before and after a probe pass: whether the pass changed them, and putting them back.

Some models change their own weights when they leave training mode: they rescale them in place, or repack quantised
ones. Checkpoints of a run that measures such a model would hold other weights than those of one that does not.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ib_callback.common.errors import ModelError
from ib_callback.measuring.model import access
from ib_callback.measuring.model.forward import free_memory
from ib_callback.measuring.model.guard import reshard

# Words that lie so far apart are summed before they are weighted. A prime, so that rows of a matrix that change places
# are noticed too.
_COLUMNS = 1021
_HOST = torch.device("cpu")


class ChangedParametersError(ModelError):
    """A model that changed its own parameters while it was measured."""


@dataclass(frozen=True)
class _Part:
    """A parameter as it was, or a plain tensor inside it: the shard of a DTensor, each of a quantised one.

    parameter: the object; `path`: attributes that lead from it to `tensor`.
    values: shares the memory of `tensor`, and keeps it.
    copy: of the values on the host; None without one.
    """

    name: str
    parameter: Tensor
    path: tuple[str, ...]
    tensor: Tensor
    values: Tensor
    copy: Tensor | None = None

    def now(self) -> Tensor:
        """What is in its place."""
        return functools.reduce(getattr, self.path, self.parameter)

    def is_elsewhere(self) -> bool:
        """Whether other memory is in its place, or the same read in another way."""
        reads = (Tensor.data_ptr, Tensor.size, Tensor.stride, operator.attrgetter("dtype"))
        now = self.now()
        return any(read(now) != read(self.values) for read in reads)

    def put_back(self) -> None:
        """The same memory in its place again."""
        if self.path:
            setattr(functools.reduce(getattr, self.path[:-1], self.parameter), self.path[-1], self.tensor)
        else:
            self.parameter.data = self.values


@contextmanager
def unchanged_parameters(model: nn.Module, *, copied: bool = False) -> Iterator[None]:
    """Parameters are after the body what they were before it, bit for bit; else an error says which is not.

    Parameters that were replaced, or put into other memory, are put back always. Values that were overwritten can be
    put back from copies only; without them a checksum on their device tells that they were. Version counters are not
    asked: writing through `.data` does not raise them, and writing what was there already does. Fully sharded models
    give their gathered parameters back before they are looked at, and of those of FSDP1 the own shards are compared.

    Args:
        model: unwrapped, still in the mode of its training.
        copied: whether to copy parameters to the host, where there is room for them.

    Raises:
        ChangedParametersError: a parameter has other values than before; also in the place of an error of the body.
    """
    reshard(model)
    before, tables = _parts(model), [(module, dict(module._parameters)) for module in model.modules()]
    if copied and _fits_on_host(before):
        before = [replace(part, copy=part.values.to(_HOST, copy=True)) for part in before]
    sums = checksums([part.values for part in before])

    interrupted = False
    try:
        yield
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        raise
    finally:
        reshard(model)
        changed, lost = _put_back(tables, before, sums)
        if changed and not interrupted:
            raise ChangedParametersError(_explanation(model, changed, lost, in_preflight=copied))


def _put_back(
    tables: list[tuple[nn.Module, dict[str, Any]]], before: list[_Part], sums: list[int]
) -> tuple[list[str], list[str]]:
    """Names of the parameters that had other values, and of those that still have them."""
    names = {id(part.parameter): part.name for part in before}
    changed: dict[str, None] = {}
    for module, table in tables:
        for name in dict.fromkeys([*table, *module._parameters]):
            was, now = table.get(name), module._parameters.get(name)
            if was is now or is_managed(was):
                continue
            if was is None or now is None or not _same_bits(was, now):
                changed[names.get(id(was), name)] = None
            vars(module).pop(name, None)  # an attribute would hide the parameter
            module._parameters[name] = was
            in_order = {name: module._parameters[name] for name in table if name in module._parameters}
            module._parameters.clear()
            module._parameters.update(in_order)
    for part in before:
        if part.is_elsewhere():
            if not _same_bits(part.now(), part.values):
                changed[part.name] = None
            part.put_back()
    lost: dict[str, None] = {}
    for part, then, after in zip(before, sums, checksums([part.values for part in before]), strict=True):
        if part.copy is None:
            if then != after:
                lost[part.name] = None
        elif not _same_bits(part.values, part.copy):
            changed[part.name] = None
            with torch.no_grad():
                part.values.copy_(part.copy)
    return [*(changed | lost)], [*lost]


def _explanation(model: nn.Module, changed: list[str], lost: list[str], *, in_preflight: bool) -> str:
    names = ", ".join(map(repr, changed[:4])) + (f" … ({len(changed)} in all)" if len(changed) > 4 else "")
    cure = (
        "Look for a forward, or a setter of `training`, that rescales, merges or repacks weights outside training, and "
        "pass forward=callable(model, input_ids, attention_mask) that runs the model without it."
    )
    what = f"{type(model).__name__} changed its own parameters {names} while it was measured, in evaluation mode"
    if not lost:
        return f"{what}. They were put back bit for bit. {cure}"
    left = "The model in memory has other weights now than training gave it, of which there is no copy:"
    then = "load it again" if in_preflight else "go on from the last checkpoint"
    return f"{what}. {left} {then}. {cure}"


def _parts(model: nn.Module) -> list[_Part]:
    """Of every parameter once, by its name in the bare model; of FSDP1 and DeepSpeed their shards."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in access.named_modules(model):
        kept = dict(module._parameters)
        flat: Any = getattr(vars(module).get("_handle"), "flat_param", None)  # FSDP1's
        kept["flat_param"] = getattr(flat, "_local_shard", None)
        for own, parameter in kept.items():
            shard = getattr(parameter, "ds_tensor", parameter)
            if shard is None or shard.is_meta or is_lazy(shard) or getattr(shard, "_fsdp_flattened", False):
                continue
            found.setdefault(id(shard), (f"{name}.{own}" if name else own, shard))
    return [part for name, parameter in found.values() for part in _plain(name, parameter, (), parameter)]


def is_managed(parameter: Any) -> bool:
    """Whether FSDP or DeepSpeed puts other tensors into the place of a parameter, and this one back, by itself."""
    return hasattr(parameter, "to_local") or hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened")


def _plain(name: str, parameter: Tensor, path: tuple[str, ...], tensor: Tensor) -> Iterator[_Part]:
    inner = _inner(tensor)
    if not inner and tensor.layout == torch.strided:
        yield _Part(name, parameter, path, tensor, tensor.detach())
    for own in inner:
        yield from _plain(name, parameter, (*path, own), getattr(tensor, own))


def _inner(tensor: Any) -> list[str]:
    """The attributes of a tensor that is made of others, in which these are."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    return [name for name in tensor.__tensor_flatten__()[0] if isinstance(getattr(tensor, name), Tensor)]


def _fits_on_host(parts: list[_Part]) -> bool:
    free = free_memory(_HOST)
    return free is None or 2 * sum(part.values.nbytes for part in parts) < free


def _same_bits(a: Tensor, b: Tensor) -> bool:
    inner = _inner(a)
    if a.shape != b.shape or a.dtype != b.dtype or inner != _inner(b):
        return False
    if inner:
        return all(_same_bits(getattr(a, name), getattr(b, name)) for name in inner)
    return torch.equal(_words(a), _words(b.to(a.device)))


def checksums(tensors: list[Tensor]) -> list[int]:
    """One for each, of its bits, with one wait for each device; another one if values change places.

    Args:
        tensors: plain ones, of any shapes, types and devices.
    """
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    sums = [0] * len(tensors)
    for places in by_device.values():
        for place, value in zip(places, torch.stack([_checksum(tensors[p]) for p in places]).tolist(), strict=True):
            sums[place] = value
    return sums


def _checksum(tensor: Tensor) -> Tensor:
    """Weighted sum of the bits as integers, modulo 2^64: exact in any order, and other if values change places."""
    words = _words(tensor)
    rows = len(words) // _COLUMNS
    columns = words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0, dtype=torch.int64)
    rest = words[rows * _COLUMNS :]
    columns[: len(rest)] += rest
    return (columns * _weights(tensor.device)).sum()


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    return torch.arange(1, _COLUMNS + 1, device=device) * 6364136223846793005 | 1


def _words(tensor: Tensor) -> Tensor:
    """[N] the bits of a tensor as integers: of 64 bits where it can be divided so, else of its own width."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.bool or flat.is_complex():
        flat = flat.view(torch.uint8) if flat.dtype == torch.bool else torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    whole = (flat.numel() * size) % 8 == 0 and (flat.storage_offset() * size) % 8 == 0
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return flat.view(torch.int64 if whole else widths[size])
