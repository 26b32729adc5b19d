"""How a model is distributed over ranks: which ranks make one forward pass together, and what cannot be measured.

Data parallelism (DDP) needs no care: `access.unwrap` takes the model out of its wrapper, and its forward pass does not
communicate. Fully sharded models gather their parameters in each forward pass, so all ranks must make equally many,
each with its own batches. Ranks of tensor parallelism make parts of one forward pass, so they must run the same batch.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ib_callback.measuring.model import access
from ib_callback.measuring.model.fully_sharded import is_fsdp1, is_fsdp2, managed

# Attributes in which transformers and Lightning keep all meshes of a model, including those of data parallelism.
_MESHES_OF_ALL = ("_device_mesh", "_mesh_manager")


@dataclass(frozen=True)
class Parallelism:
    """How a model is distributed over ranks.

    refusal: why it cannot be measured, with a cure; "" if it can.
    is_sharded: whether forward passes communicate with ranks that may run other batches. All ranks must then make
        equally many.
    together: global ranks, including this one, that must run the same batch in the same forward pass; empty without
        such ranks. It is the same on each of them.
    kinds: names of the kinds of parallelism that were found, for messages.
    """

    refusal: str = ""
    is_sharded: bool = False
    together: tuple[int, ...] = ()
    kinds: tuple[str, ...] = field(default=())

    def describe(self) -> str:
        """The kinds of parallelism in one phrase.

        >>> Parallelism(kinds=("FSDP2", "tensor parallel")).describe()
        'FSDP2, tensor parallel'
        """
        return ", ".join(self.kinds) or "whole on each rank"


def parallelism(model: nn.Module) -> Parallelism:
    """Find out how a model is distributed over ranks, without communication.

    If it is unclear which ranks belong together, all of them are taken.

    Args:
        model: the model from `access.unwrap`.
    """
    refusal = _refusal(model)
    if not (dist.is_available() and dist.is_initialized()):
        return Parallelism(refusal, _is_sharded(model), (), tuple(_kinds(model, ())))
    together = _together(model)
    return Parallelism(refusal, _is_sharded(model), together, tuple(_kinds(model, together)))


def _kinds(model: nn.Module, together: tuple[int, ...]) -> Iterator[str]:
    modules = list(model.modules())
    if any(map(is_fsdp1, modules)):
        yield "FSDP1"
    if any(map(is_fsdp2, modules)):
        yield "FSDP2"
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        yield "ZeRO-3"
    if any(map(_is_replicated, modules)):
        yield "replicate"
    if _exchanges_tokens(model):
        yield "expert parallel"
    if len(together) > 1:
        yield f"tensor parallel over {len(together)} ranks"


def _is_sharded(model: nn.Module) -> bool:
    return (
        any(is_fsdp1(module) or is_fsdp2(module) or _is_replicated(module) for module in model.modules())
        or any(hasattr(p, "ds_id") for p in model.parameters())
        or _exchanges_tokens(model)
    )


def _is_replicated(module: nn.Module) -> bool:
    """Whether torch's composable `replicate` was applied to a module; it broadcasts buffers before each forward."""
    contract: Any = sys.modules.get("torch.distributed._composable.contract")
    get: Any = getattr(contract, "_get_registry", lambda module: None)
    return "replicate" in (get(module) or ()) and not is_fsdp2(module)


def _mesh_manager(model: nn.Module) -> Any:
    """All meshes of a model that transformers has distributed; None for other models."""
    return getattr(access.bare(model), "_mesh_manager", None)


def _exchanges_tokens(model: nn.Module) -> bool:
    """Whether experts of transformers are on ranks with other batches; tokens are sent there in each forward pass."""
    config = getattr(getattr(access.bare(model), "config", None), "distributed_config", None)
    return _mesh_manager(model) is not None and getattr(config, "ep_size", 1) > getattr(config, "tp_size", 1)


# --- which ranks run the same batch


def _together(model: nn.Module) -> tuple[int, ...]:
    try:
        groups = {ranks for ranks in _groups(model) if len(ranks) > 1}
    except Exception:  # for example, if private names of torch or transformers have changed
        return tuple(range(dist.get_world_size()))
    widest = max(groups, key=len, default=frozenset({dist.get_rank()}))
    if any(not ranks <= widest for ranks in groups):
        return tuple(range(dist.get_world_size()))
    return tuple(sorted(widest))


def _groups(model: nn.Module) -> Iterator[frozenset[int]]:
    """Groups of ranks, including this one, that make one forward pass together; a group may occur more than once."""
    of_fsdp = managed(model)
    for parameter, _ in of_fsdp.values():
        if parameter.is_dtensor:  # another kind of parallelism sharded it before FSDP
            yield _beside_data_parallelism(parameter, model)
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and id(parameter) not in of_fsdp:
            yield _ranks(mesh, model)
    for module in model.modules():
        yield from _of_attributes(module)


def _beside_data_parallelism(parameter: Any, model: nn.Module) -> frozenset[int]:
    """The ranks over which a parameter of FSDP2 is spread in addition to its sharding."""
    mesh = parameter._unsharded_dtensor_spec.mesh
    if parameter.mesh_info.is_spmd_mesh:
        names = [name for i, name in enumerate(mesh.mesh_dim_names) if i not in parameter._dp_dim_indices]
        if not names:
            return frozenset()
        mesh = mesh[tuple(names)]
    return _ranks(mesh, model)


def _ranks(mesh: Any, model: nn.Module) -> frozenset[int]:
    """The ranks of a mesh; for transformers' mesh of experts, only those that have the same batch anyway."""
    if (manager := _mesh_manager(model)) is not None and "ep" in (mesh.mesh_dim_names or ()):
        mesh = manager.get_mesh("tp")
    return frozenset(mesh.mesh.flatten().tolist())


def _of_attributes(module: nn.Module) -> Iterator[frozenset[int]]:
    """The ranks of process groups and meshes that a module holds, as layers of DeepSpeed and Megatron do."""
    if is_fsdp1(module) or isinstance(module, (nn.SyncBatchNorm, nn.parallel.DistributedDataParallel)):
        return
    for name, value in vars(module).items():
        if name in _MESHES_OF_ALL:
            continue
        if isinstance(value, dist.ProcessGroup):
            yield frozenset(dist.get_process_group_ranks(value))
        elif isinstance(value, dist.device_mesh.DeviceMesh):
            yield frozenset(value.mesh.flatten().tolist())


# --- what cannot be measured

_AFTERWARDS = (
    "Measure its saved checkpoints with `ib-callback measure` or a Meter, in a process that holds the whole model."
)


def _refusal(model: nn.Module) -> str:
    name = type(access.bare(model)).__name__
    if where := _pipeline(model):
        return (
            f"{name} is one stage of a pipeline ({where}): expected all of its blocks on each rank, got those of one "
            f"stage. {_AFTERWARDS}"
        )
    if where := _context(model):
        return (
            f"{name} divides each text among ranks ({where}): expected the states of whole texts, but this model would "
            f"take a whole text for one rank's share of a longer one. {_AFTERWARDS}"
        )
    return ""


def _pipeline(model: nn.Module) -> str:
    """The evidence that a model is a stage of a pipeline; "" without any."""
    for path, module in model.named_modules():
        stage = vars(module).get("_pp_stage")
        if stage is not None and getattr(stage, "pp_size", 2) > 1:
            return "pp_size of transformers"
        for base in type(module).__mro__:
            if base.__name__ in ("PipelineIdentityLayer", "PipelineModule", "PipelineEngine"):
                return f"{path or 'the model'} is a {base.__name__}"
    if (pipelining := sys.modules.get("torch.distributed.pipelining.stage")) is not None:
        inside = set(map(id, model.modules()))
        for each in gc.get_objects():  # a stage refers to its module, but the module does not refer to the stage
            if isinstance(each, pipelining._PipelineStageBase) and each.num_stages > 1 and id(each.submod) in inside:
                return f"stage {each.stage_index} of {each.num_stages} of torch.distributed.pipelining"
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _passed_through(model)
    return ""


def _passed_through(model: nn.Module) -> str:
    """The first list with most of the model that holds empty places next to blocks, as in the stages of a pipeline."""
    total = sum(p.numel() for p in model.parameters())
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        empty = [name for name, part in module.named_children() if isinstance(part, nn.Identity)]
        if empty and 2 * sum(p.numel() for p in module.parameters()) > total:
            return f"{path}.{empty[0]} is an empty place"
    return ""


def _context(model: nn.Module) -> str:
    """The evidence that each text is split over ranks; "" without any."""
    for path, module in model.named_modules():
        if any(base.__name__ in _ULYSSES for base in type(module).__mro__):
            return f"{path or 'the model'} is a {type(module).__name__}"
        for hook in module._forward_pre_hooks.values():
            while isinstance(hook, functools.partial):
                hook = hook.func
            if getattr(hook, "__qualname__", "").startswith("_ContextParallel."):
                return f"context parallelism of torch on {path or 'the model'}"
    attention = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if torch.nn.functional.scaled_dot_product_attention in getattr(attention, "_replaced_functions", {}):
        return "it is measured inside `context_parallel`; leave that context first"
    return _ulysses_of_transformers(model)


# Attention of DeepSpeed that exchanges parts of sequences for parts of heads.
_ULYSSES = ("DistributedAttention", "UlyssesSPAttentionHF", "UlyssesSPViTAttention", "FPDT_Attention")


def _ulysses_of_transformers(model: nn.Module) -> str:
    """Whether DeepSpeed has replaced the attention function that transformers calls."""
    table = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    kind = getattr(access.text_config(model), "_attn_implementation", None)
    function = dict(table).get(kind)
    if (getattr(function, "__module__", None) or "").startswith("deepspeed.runtime.sequence_parallel"):
        return f"sequence parallelism of DeepSpeed in the place of {kind!r} attention"
    return ""
