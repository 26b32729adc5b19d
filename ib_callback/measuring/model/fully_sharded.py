"""Internal facts of FSDP: which parameters it manages, over which ranks, in what type and where it computes.

torch has no public names for any of this. So in another version a function here may find nothing; callers then take
the safe way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is a wrapper of FSDP1."""
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` (or `replicate`, which builds on it) was applied to the module itself."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def give_back(model: nn.Module) -> None:
    """Make FSDP release the parameters that it has gathered.

    The outermost module, and others depending on their strategy, keep gathered parameters after a forward pass, because
    they expect a backward pass. They would still use them after the next optimizer step.
    """
    for module in model.modules():
        sharded: Any = module
        if is_fsdp2(module):
            sharded.reshard()
        elif is_fsdp1(module) and (handle := getattr(module, "_handle", None)) is not None:
            has_run = hasattr(handle.flat_param, "_full_param_padded")
            if has_run and handle.uses_sharded_strategy and not handle.needs_unshard():
                _runtime()._reshard(sharded, handle, True)


def _runtime() -> Any:
    """The runtime module of FSDP1. It is imported already if a model uses FSDP1; importing it takes long."""
    return sys.modules["torch.distributed.fsdp._runtime_utils"]


def parameter_groups(model: nn.Module) -> Iterator[Any]:
    """The groups of parameters that FSDP2 gathers together, each once, in the order of the modules."""
    seen: set[int] = set()
    for module in model.modules():
        if not is_fsdp2(module):
            continue
        sharded: Any = module
        state = sharded._get_fsdp_state()
        for group in state._fsdp_param_groups:
            if id(group) not in seen:
                seen.add(id(group))
                yield group


def managed(model: nn.Module) -> dict[int, tuple[Any, Any]]:
    """FSDP2's record of each parameter, and the group in which it is gathered, by the id of the tensor.

    Loading may have replaced tensors; FSDP notices this only at the next forward pass.

    Raises:
        AttributeError: this version of torch has other names.
    """
    found: dict[int, tuple[Any, Any]] = {}
    for group in parameter_groups(model):
        for parameter in group.fsdp_params:
            places = parameter._module_info
            tensors = [parameter.sharded_param, getattr(parameter, "_unsharded_param", None)]
            tensors += [getattr(places.module, places.param_name, None)]
            tensors += map(getattr, places.shared_modules, places.shared_param_names)
            found |= {id(tensor): (parameter, group) for tensor in tensors if tensor is not None}
    return found


def _first_group(model: nn.Module) -> Any:
    """The group of the first floating-point parameter of FSDP2; None without one."""
    try:
        found = managed(model)
    except AttributeError:
        return None
    groups = (found[id(p)][1] for p in model.parameters() if p.is_floating_point() and id(p) in found)
    return next(groups, None)


def computed_in(model: nn.Module) -> torch.dtype | None:
    """The type to which FSDP casts the first parameters for a forward pass; None if it does not cast them.

    Under FSDP2's `MixedPrecisionPolicy(param_dtype=…)`, or FSDP1's `MixedPrecision`, the forward pass uses parameters
    of that type, even if the optimizer sees another one.
    """
    policy = getattr(_first_group(model), "mp_policy", None)
    for module in model.modules():
        if policy is None and is_fsdp1(module):
            policy = getattr(module, "mixed_precision", None)
    dtype = getattr(policy, "param_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def computed_on(model: nn.Module) -> torch.device | None:
    """The device on which FSDP computes, which differs from that of offloaded parameters; None without FSDP."""
    device = getattr(_first_group(model), "device", None)
    for module in model.modules():
        if device is None and is_fsdp1(module):
            device = getattr(module, "compute_device", None)
    return device if isinstance(device, torch.device) else None
