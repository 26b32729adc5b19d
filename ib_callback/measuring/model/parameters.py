"""Check whether a probe pass changed the parameters of a model, and restore them.

Some models change their own weights when they leave training mode: they rescale them in place, or repack quantised
weights. If a run measured such a model, its checkpoints would hold other weights than without the measurement.
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
from ib_callback.measuring.model.bits import checksums, inner, is_plain, same_bits
from ib_callback.measuring.model.forward import free_memory
from ib_callback.measuring.model.guard import reshard

_HOST = torch.device("cpu")


class ChangedParametersError(ModelError):
    """A model that changed its own parameters while it was measured."""


@dataclass(frozen=True)
class _Part:
    """A parameter before the pass, or a plain tensor inside it: the shard of a DTensor, or a part of a quantised one.

    parameter: the parameter object; `path`: attributes that lead from it to `tensor`.
    values: shares the memory of `tensor`, and keeps it alive.
    copy: copy of the values on the host; None without one.
    """

    name: str
    parameter: Tensor
    path: tuple[str, ...]
    tensor: Tensor
    values: Tensor
    copy: Tensor | None = None

    def now(self) -> Tensor:
        """The tensor that is in its place now."""
        return functools.reduce(getattr, self.path, self.parameter)

    def is_elsewhere(self) -> bool:
        """Whether its place now has other memory, or the same memory with another shape or type."""
        reads = (Tensor.data_ptr, Tensor.size, Tensor.stride, operator.attrgetter("dtype"))
        now = self.now()
        return any(read(now) != read(self.values) for read in reads)

    def put_back(self) -> None:
        """Put the same memory back in its place."""
        if self.path:
            setattr(functools.reduce(getattr, self.path[:-1], self.parameter), self.path[-1], self.tensor)
        else:
            self.parameter.data = self.values


@dataclass(frozen=True)
class _Table:
    """The parameters, or the submodules, of a module before the pass, and all its other attributes."""

    module: nn.Module
    kind: str
    entries: dict[str, Any]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, kind: str) -> _Table:
        # The tables of TorchScript have items() too; they cannot change.
        return cls(module, kind, dict(getattr(module, kind).items()), dict(vars(module)))

    def put_back(self) -> list[tuple[str, Tensor]]:
        """Put the same objects back in their places, in order; return the parameters that had been replaced.

        Anything that was added is removed. This does not count as a change, as with buffers.
        """
        now = dict(getattr(self.module, self.kind).items())
        names = dict.fromkeys([*self.entries, *now])
        moved = [n for n in names if self.entries.get(n) is not now.get(n) and not is_managed(self.entries.get(n))]
        if not moved:
            return []
        for name in moved:
            vars(self.module).pop(name, None)  # an attribute would hide the parameter
            if name in self.attributes:
                vars(self.module)[name] = self.attributes[name]
        table = getattr(self.module, self.kind)
        table.clear()
        kept = {name: value for name, value in now.items() if name not in moved}
        table.update({n: kept.get(n, self.entries[n]) for n in self.entries if n in now or n in moved})
        return [(name, p) for name in moved for p in _replaced(self.entries.get(name), now.get(name))]


def _replaced(was: Any, now: Any) -> list[Tensor]:
    """The parameters of a place that now have other values or are missing."""
    if isinstance(was, nn.Module):
        there = {id(parameter) for parameter in now.parameters()} if isinstance(now, nn.Module) else set()
        return [parameter for parameter in was.parameters() if id(parameter) not in there]
    return [] if was is None or (now is not None and same_bits(was, now)) else [was]


@contextmanager
def unchanged_parameters(model: nn.Module, *, copied: bool = False) -> Iterator[None]:
    """Check that parameters are the same before and after the body, bit for bit, and restore what can be restored.

    Replaced parameters, replaced parts of the model, and parameters moved to other memory are always put back. So are
    `requires_grad` and the gradient objects. Overwritten values can be put back only from copies. Without copies, a
    checksum on their device detects that they changed. Version counters are not used, because writing through `.data`
    does not raise them, and writing the same values does. Fully sharded models release their gathered parameters before
    the check; with FSDP1, each rank compares its own shards.

    Args:
        model: unwrapped model, still in the mode of its training.
        copied: whether to copy parameters to the host, if there is room for them.

    Raises:
        ChangedParametersError: a parameter has other values than before. It replaces an error of the body.
    """
    reshard(model)
    before = _parts(model)
    # accelerate itself replaces offloaded parameters and takes the replacements away.
    of_its_own = [module for module in model.modules() if not access.is_offloaded(module)]
    tables = [_Table.of(module, kind) for module in of_its_own for kind in ("_parameters", "_modules")]
    training = [(p, p.requires_grad, p.grad) for p in model.parameters() if not is_managed(p)]
    if copied and _fits_on_host(before):
        before = [replace(part, copy=part.values.to(_HOST, copy=True)) for part in before]
    uncopied = [part.values for part in before if part.copy is None]
    sums = checksums(uncopied)

    interrupted = False
    try:
        yield
    except BaseException as error:
        interrupted = not isinstance(error, Exception)
        raise
    finally:
        reshard(model)
        changed = _put_back(tables, before)
        for parameter, requires_grad, gradient in training:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        pairs = zip((part.name for part in before if part.copy is None), sums, checksums(uncopied), strict=True)
        lost = [name for name, then, now in pairs if then != now]
        changed = [*dict.fromkeys([*changed, *lost])]
        if changed and not interrupted:
            raise ChangedParametersError(_explanation(model, changed, lost, in_preflight=copied))


def _put_back(tables: list[_Table], before: list[_Part]) -> list[str]:
    """Put everything back; return the names of the parameters that had changed and could be put back."""
    names = {id(part.parameter): part.name for part in before}
    changed: list[str] = []
    for table in tables:
        changed += [names.get(id(parameter), name) for name, parameter in table.put_back()]
    for part in before:
        if part.is_elsewhere():
            if not same_bits(part.now(), part.values):
                changed.append(part.name)
            part.put_back()
        if part.copy is not None and not same_bits(part.values, part.copy):
            changed.append(part.name)
            with torch.no_grad():
                part.values.copy_(part.copy)
    return changed


def _explanation(model: nn.Module, changed: list[str], lost: list[str], *, in_preflight: bool) -> str:
    names = ", ".join(map(repr, changed[:4])) + (f" … ({len(changed)} in all)" if len(changed) > 4 else "")
    cure = (
        "Look for a forward, or a setter of `training`, that rescales, merges or repacks weights outside training. "
        "Then pass forward=callable(model, input_ids, attention_mask) that runs the model without it."
    )
    what = f"{type(model).__name__} changed its own parameters {names} while it was measured, in evaluation mode"
    if not lost:
        return f"{what}. They were put back bit for bit. {cure}"
    left = "The model in memory no longer has the weights from training, and there is no copy of them:"
    then = "load it again" if in_preflight else "go on from the last checkpoint"
    return f"{what}. {left} {then}. {cure}"


def _parts(model: nn.Module) -> list[_Part]:
    """The parts of every parameter, each once, by its name in the bare model; for FSDP1 and DeepSpeed, their shards."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in access.named_modules(model):
        kept = dict(module._parameters.items())
        flat: Any = getattr(vars(module).get("_handle"), "flat_param", None)  # FSDP1's
        kept["flat_param"] = getattr(flat, "_local_shard", None)
        for own, parameter in kept.items():
            shard = getattr(parameter, "ds_tensor", parameter)
            if shard is None or shard.is_meta or is_lazy(shard) or getattr(shard, "_fsdp_flattened", False):
                continue
            found.setdefault(id(shard), (f"{name}.{own}" if name else own, shard))
    return [part for name, parameter in found.values() for part in _plain(name, parameter, (), parameter)]


def is_managed(parameter: Any) -> bool:
    """Whether FSDP or DeepSpeed itself replaces a parameter by other tensors, and puts it back."""
    return hasattr(parameter, "to_local") or hasattr(parameter, "ds_id") or hasattr(parameter, "_fsdp_flattened")


def _plain(name: str, parameter: Tensor, path: tuple[str, ...], tensor: Tensor) -> Iterator[_Part]:
    parts = inner(tensor)
    if not parts and is_plain(tensor):
        yield _Part(name, parameter, path, tensor, tensor.detach())
    for own in parts:
        yield from _plain(name, parameter, (*path, own), getattr(tensor, own))


def _fits_on_host(parts: list[_Part]) -> bool:
    free = free_memory(_HOST)
    return free is None or 2 * sum(part.values.nbytes for part in parts) < free
