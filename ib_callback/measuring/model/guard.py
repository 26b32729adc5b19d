"""Leave no trace: save everything that a probe pass could change in a training run, and restore it afterwards."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ib_callback.measuring.model.bits import is_plain, same_bits
from ib_callback.measuring.model.fully_sharded import computed_on, is_fsdp1, is_fsdp2
from ib_callback.measuring.model.fully_sharded import give_back as reshard

# Packages whose forward hooks only observe, and count each forward pass as one of training. For example, `wandb.watch`
# would log histograms of parameters more often, and the graph of a probe pass.
OBSERVERS = ("wandb", "comet_ml", "mlflow", "neptune", "swanlab", "aim", "clearml")

# For context parallelism, accelerate hooks attention, which makes sense only inside `maybe_context_parallel`. Outside,
# a rank runs whole texts, and the only effect of the hook is that attention includes padding.
_OF_CONTEXT_PARALLELISM = "_attach_context_parallel_hooks.<locals>._self_attn_pre_forward_hook"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Everything is restored at the end, also when the body raises.

    Restored are the `training` flag of every single submodule, every buffer, the rotary-length caches that some models
    keep as plain attributes, the random states of Python, NumPy and torch, and gradient mode. Compiled code is
    bypassed, because hooks registered after a compilation would silently not fire, and new graphs would use up the
    training's recompilation budget. Hooks of loggers are set aside (`OBSERVERS`). All other hooks run, because they may
    be part of the model (PEFT, accelerate, FSDP, steering of activations).
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng(_devices(model)))
        stack.enter_context(_preserved_state(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        stack.enter_context(_unobserved(model))
        stack.enter_context(_padded(model))
        for module in model.modules():
            # Not module.eval(), because subclasses may override it, and train(mode) recurses.
            module.training = False
        yield


@contextmanager
def _padded(model: nn.Module) -> Iterator[None]:
    """Turn off the nested tensors that torch's encoder makes of padded sequences in evaluation mode."""
    nesting = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    ]
    for module in nesting:
        module.use_nested_tensor = False
    try:
        yield
    finally:
        for module in nesting:
            module.use_nested_tensor = True


@contextmanager
def _unobserved(model: nn.Module) -> Iterator[None]:
    """Remove the forward hooks of `OBSERVERS`, both of modules and global ones, and put them back at the end.

    The hooks of accelerate for context parallelism are removed too.
    """
    tables = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    tables += [torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks]
    aside = []
    for hooks in tables:
        if observing := {number: hook for number, hook in hooks.items() if _is_set_aside(hook)}:
            aside.append((hooks, list(hooks), observing))
            for number in observing:
                del hooks[number]
    try:
        yield
    finally:
        for hooks, order, observing in aside:
            now = {**observing, **hooks}
            numbers = [number for number in order if number in now]
            hooks.clear()  # in place, because handles refer to the table
            hooks.update({number: now[number] for number in dict.fromkeys([*numbers, *now])})


def _is_set_aside(hook: Any) -> bool:
    return _owner(hook) in OBSERVERS or getattr(hook, "__qualname__", "") == _OF_CONTEXT_PARALLELISM


def _owner(hook: Any) -> str:
    """Name of the package in which a hook was written."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    named = hook if isinstance(hook, types.FunctionType) else getattr(hook, "__func__", type(hook))
    return (getattr(named, "__module__", None) or "").split(".")[0]


@contextmanager
def preserved_rng(devices: set[torch.device] | None = None) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (CPU and the given devices) at the end."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    # MPS has one device; its functions take no device argument.
    on_devices = [(getattr(torch, d.type), () if d.type == "mps" else (d,)) for d in devices or ()]
    device_states = [module.get_rng_state(*device) for module, device in on_devices]
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for (module, device), state in zip(on_devices, device_states, strict=True):
            module.set_rng_state(state, *device)


@contextmanager
def _preserved_state(model: nn.Module) -> Iterator[None]:
    saved = []
    for module in model.modules():
        buffers = dict(module._buffers.items())  # TorchScript has items() too
        plain = [buffer for buffer in buffers.values() if buffer is not None and is_plain(buffer)]
        saved.append((module, module.training, buffers, [(buffer, buffer.clone()) for buffer in plain]))
    caches = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("max_seq_len_cached")
    ]
    try:
        yield
    finally:
        for module, training, buffers, copies in saved:
            module.training = training
            if [*map(id, module._buffers.values())] != [*map(id, buffers.values())]:
                module._buffers.clear()  # new buffers may have been added
                module._buffers.update(buffers)
            for buffer, copy in copies:
                # Unchanged buffers are not written, because their version counters may matter to autograd.
                if (buffer.shape, buffer.dtype) != (copy.shape, copy.dtype):
                    buffer.data = copy
                elif not same_bits(buffer, copy):
                    with torch.no_grad():
                        buffer.copy_(copy)
        for module, name, value in caches:
            setattr(module, name, value)


def _devices(model: nn.Module) -> set[torch.device]:
    """Accelerators that hold parameters of the model, or compute with them, and have random states of their own."""
    devices = {p.device for p in model.parameters()} | {computed_on(model)}
    return {device for device in devices if device is not None and device.type in ("cuda", "mps", "xpu")}


def _eager() -> Any:
    # If nothing was compiled, there is nothing to bypass, and importing the compiler takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Make FSDP release its gathered parameters at the end; otherwise it would continue with stale weights."""
    try:
        yield
    finally:
        reshard(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether the forward pass gathers parameters from other ranks, as with FSDP or stage 3 of DeepSpeed."""
    return any(is_fsdp1(module) or is_fsdp2(module) for module in model.modules()) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    )
