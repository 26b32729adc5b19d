"""Find the parts of a model that matter for a measurement: its blocks, its trunk, and its limits.

The *trunk* is the module that makes the hidden states: the model without its output head.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ib_callback.common.errors import ModelError
from ib_callback.measuring.model.fully_sharded import computed_in, computed_on

# Attributes in which wrappers of torch.compile, FSDP, activation checkpointing and Lightning Fabric keep their content.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")

Layers = str | Iterable[str] | Callable[[nn.Module], Iterable[nn.Module]]


@dataclass(frozen=True)
class Layer:
    """A module whose output is measured, and the name under which it is reported."""

    name: str
    module: nn.Module


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for data parallelism and compilation that do not change its forward pass.

    Calling the model inside DistributedDataParallel, or inside DeepSpeed's engine, gives the same result without their
    communication.

    Raises:
        TypeError: `model` is not a module.
        ModelError: its parameters have no values, or it runs outside Python.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if any(p.is_meta and not is_offloaded(part) for part in model.modules() for p in part.parameters(recurse=False)):
        raise ModelError(
            f"{type(model).__name__} has parameters on the meta device, where they have no values. Load its weights "
            "first."
        )
    if isinstance(bare(model), torch.jit.ScriptModule):
        raise ModelError(
            f"{type(model).__name__} was made by TorchScript, which runs outside Python, where hooks see nothing. "
            "Measure the model that it was made from."
        )
    return without_parallelism(model)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches a module's own parameters from the host's memory or a disk for each call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def without_parallelism(model: nn.Module) -> nn.Module:
    """`unwrap` without its checks."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or _hands_on(model):
            inside: Any = model.module
        else:
            # Not by getattr, because FSDP looks up missing attributes in what it wraps, and must not be bypassed.
            inside = dict(model._modules.items()).get("_orig_mod")  # TorchScript's table has no get
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def _hands_on(model: nn.Module) -> bool:
    """Whether a model is an engine of DeepSpeed whose forward adds only book-keeping of the training."""
    if not any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__):
        return False
    autocasts: Any = getattr(model, "torch_autocast_enabled", None)
    return not (callable(autocasts) and autocasts())


def wrapped(module: nn.Module) -> nn.Module | None:
    """The content of a wrapper, one level down or, for PEFT, the base model; None if the module is not a wrapper.

    A part named `module` counts as wrapped if it is the only part and all arguments are passed on, as in
    DistributedDataParallel, DataParallel, DeepSpeed's engine and AveragedModel. The checks are needed because a model
    may use that name too.
    """
    get_base: Any = getattr(type(module), "get_base_model", None)
    if callable(get_base):  # PEFT
        try:
            base = get_base(module)
        except Exception:
            return None  # another method of that name
        return base if any(base is part for part in module.modules() if part is not module) else None
    parts = {name: part for name, part in module._modules.items() if part is not None}
    for name in _WRAPPED:
        if name in parts:
            return parts[name]
    if list(parts) != ["module"] or isinstance(module, torch.jit.ScriptModule):
        return None
    kinds = {parameter.kind for parameter in inspect.signature(type(module).forward).parameters.values()}
    return parts["module"] if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds else None


def bare(model: nn.Module) -> nn.Module:
    """The model inside all wrappers, which has the configuration. Not every such model can be called on its own."""
    while (inside := wrapped(model)) is not None:
        model = inside
    return model


def transformers_models(module: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The transformers models inside a module, by name, without those that are part of another one."""
    if is_transformers_model(module) or is_transformers_model(bare(module)):
        # A sharded model has to be called through its wrapper.
        return {name: without_parallelism(module)}
    found: dict[str, nn.Module] = {}
    for child_name, child in module.named_children():
        found |= transformers_models(child, f"{name}.{child_name}" if name else child_name)
    return found


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers or peft."""
    # Checked by name, so neither package is imported for an unrelated model.
    bases = {(base.__module__.split(".")[0], base.__name__) for base in type(module).__mro__}
    return ("transformers", "PreTrainedModel") in bases or ("peft", "PeftModel") in bases


def is_own_class(model: nn.Module) -> bool:
    """Whether the class that defines the model's forward is part of transformers itself."""
    return (getattr(type(model).forward, "__module__", None) or "").startswith("transformers.")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` with names as in the model without wrappers: a wrapper has the name of its content."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        if (inside := wrapped(module)) is not None:
            yield from walk(inside, name)
        for part_name, part in module._modules.items():
            if part is not None:
                yield from walk(part, f"{name}.{part_name}" if name else part_name)

    yield from walk(model, "")


def resolve_layers(model: nn.Module, layers: Layers) -> list[Layer]:
    """The modules to measure, in the order in which the model registers them, usually that of the forward pass.

    Args:
        model: unwrapped model.
        layers: `"hidden_states"` (output of every block, the last after the final norm, as in
            `output_hidden_states=True` without the embeddings), `"blocks"` (raw block outputs), module names or
            globs, or a callable model → modules. In a model without a configuration the blocks are the only outermost
            list of modules that have parts, and the final norm is the last norm after it. Names are those of the model
            without wrappers. Names with wrappers are accepted too, and reported without.

    Raises:
        ModelError: nothing was found; the message lists candidates.
    """
    if isinstance(layers, str) and layers in ("hidden_states", "blocks"):
        trunk, blocks = _find_blocks(model)
        if layers == "blocks":
            return blocks
        # hidden_states[-1] is by definition the trunk's own output, after the final norm if there is one.
        return [*blocks[:-1], Layer(f"{blocks[-1].name}:final", trunk)]
    if callable(layers):
        names = {module: name for name, module in named_modules(model)}
        returned: Any = layers(model)
        modules = list(returned) if isinstance(returned, Iterable) else []
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise ModelError(f"layers: expected the callable to return a list of modules, got {returned!r}.")
        return _distinct([Layer(names.get(module, f"layer_{i}"), module) for i, module in enumerate(modules)])
    patterns = [layers] if isinstance(layers, str) else list(layers)
    return _distinct([layer for pattern in patterns for layer in _matching(model, pattern)])


def _matching(model: nn.Module, pattern: str) -> list[Layer]:
    named: dict[str, Layer] = {}
    for name, module in named_modules(model):
        if name:
            named.setdefault(name, Layer(name, module))  # of a wrapper and its content, the one that the parent calls
    found = [layer for layer in named.values() if _matches(layer.name, pattern)]
    if not found:
        spelled = {module for name, module in model.named_modules() if _matches(name, pattern)}
        found = [layer for layer in named.values() if spelled & {layer.module, bare(layer.module)}]
    if not found:
        raise ModelError(
            f"layers: no module of {type(model).__name__} is called {pattern!r}. Expected names or globs such as "
            f"{some(named)}."
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a dotted name matches a glob part by part: `h.*` matches `h.0` but not `h.0.attn`."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _distinct(layers: list[Layer]) -> list[Layer]:
    if not layers:
        raise ModelError('layers: expected at least one layer, got none. Use "hidden_states", "blocks" or names.')
    seen: dict[int, Layer] = {}
    for layer in layers:
        if seen.setdefault(id(layer.module), layer) is not layer:
            raise ModelError(f"layers: module {layer.name!r} was named twice; name each module once.")
    return layers


def _find_blocks(model: nn.Module) -> tuple[nn.Module, list[Layer]]:
    """The trunk, which is the decoder, the base model or the model itself, and its blocks."""
    refuse_encoder_decoder(model)
    base: Any = bare(model)
    number = getattr(text_config(model), "num_hidden_layers", None)
    names = {module: name for name, module in named_modules(model)}
    decoder = getattr(base, "get_decoder", None)
    inside = getattr(base, getattr(base, "base_model_prefix", ""), None)
    # Some models call a part of their head "decoder", so the trunk must be the candidate that has the blocks.
    candidates: tuple[Any, ...] = (decoder() if callable(decoder) else None, inside, base)
    for trunk in candidates:
        stack = _stack(trunk, number)
        if stack is not None:
            name = names[stack]
            headed = trunk is base and named_by_model(model, "get_output_embeddings") is not None
            if headed:
                # The model's name for its trunk does not apply here: the trunk is the part with the blocks.
                trunk = next((part for part in base.children() if stack in part.modules() and part is not stack), base)
            if isinstance(trunk, nn.ModuleDict) or (trunk is base and (headed or not is_own_class(base))):
                return _plain_trunk(model, name, stack)  # because the called module returns logits, or may
            return trunk, [Layer(f"{name}.{i}" if name else str(i), block) for i, block in enumerate(stack)]
    if number is None:
        lists = _lists_of_blocks(model)
        if len(lists) == 1:
            return _plain_trunk(model, *lists[0])
        if lists:
            told = " or ".join(f"layers={_layers_of(model, *each)!r}" for each in lists)
            raise ModelError(
                f"layers: {type(model).__name__} has {len(lists)} lists of blocks. Say which one to measure: pass "
                f"{told}. The last name in each is the norm after the blocks, if there is one."
            )
    expected = f"a list of {number} blocks (config.num_hidden_layers)" if number else "config.num_hidden_layers"
    raise ModelError(
        f"layers: the blocks of {type(model).__name__} could not be found. Expected {expected}, got "
        f"{_candidates(model)}. Name them with layers=[...] (module names or globs) or layers=callable."
    )


def _lists_of_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Lists of modules that have parts themselves, by name; without lists inside another one, such as heads in a block.

    A ModuleList with one entry counts only if there is no longer list.
    """
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, module in named_modules(model):
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and module not in inside:
            whole = all(any(part.children()) for part in module)
            alike = isinstance(module, nn.ModuleList) or len({type(part) for part in module}) == 1 < len(module)
            if whole and alike:
                found.append((name, module))
                inside.update(module.modules())
    longer = [(name, stack) for name, stack in found if len(list(stack.children())) > 1]
    return longer or found


def _norm_behind(model: nn.Module, name: str, stack: nn.Module) -> tuple[str, nn.Module] | None:
    """The last norm next to a list of blocks, or else next to the module that holds the list; None without one."""
    named = dict(named_modules(model))
    while name:
        name = name.rpartition(".")[0]
        after, seen = None, False
        for part_name, part in named[name].named_children():
            seen = seen or stack in set(part.modules())
            if seen and "norm" in type(part).__name__.lower():
                after = (f"{name}.{part_name}" if name else part_name, part)
        if after is not None:
            return after
    return None


def _plain_trunk(model: nn.Module, name: str, stack: nn.Module) -> tuple[nn.Module, list[Layer]]:
    """The blocks of a list, and as the trunk the norm after them, or the last block if there is no norm."""
    blocks = [Layer(f"{name}.{i}", block) for i, block in enumerate(stack.children())]
    norm = _norm_behind(model, name, stack)
    return blocks[-1].module if norm is None else norm[1], blocks


def _layers_of(model: nn.Module, name: str, stack: nn.Module) -> list[str]:
    """The layers of `_plain_trunk` as names for layers=."""
    norm = _norm_behind(model, name, stack)
    if norm is None:
        return [f"{name}.*"]
    return [*(f"{name}.{i}" for i in range(len(list(stack.children())) - 1)), norm[0]]


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raise a ModelError for an encoder-decoder, whose two stacks read different tokens; an encoder alone passes."""
    configs: tuple[Any, ...] = (getattr(bare(model), "config", None), text_config(model))
    if any(getattr(config, "is_encoder_decoder", False) is True for config in configs):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder: it reads one text and writes another, while complexity and "
            "expressivity are defined on one. Say which stack is to be measured, and on what inputs: name its modules "
            "with layers=[...] and pass forward=callable(model, input_ids, attention_mask). For its encoder: "
            "layers=lambda model: …, the blocks of model.get_encoder(), and forward=lambda model, ids, mask: "
            "model.get_encoder()(input_ids=ids, attention_mask=mask)."
        )


def _stack(trunk: Any, number: Any) -> nn.ModuleList | None:
    """The list of `number` blocks; the shallowest one, because a block may itself hold a list of the same length."""
    if not isinstance(trunk, nn.Module) or not isinstance(number, int) or number < 1:
        return None
    stacks = [(name.count("."), module) for name, module in trunk.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(depth, stack) for depth, stack in stacks if len(stack) == number]
    return min(stacks, key=lambda found: found[0])[1] if stacks else None


def _candidates(model: nn.Module) -> str:
    lists = [
        f"layers=['{name}.*'] ({len(module)} × {type(module[0]).__name__})"
        for name, module in named_modules(model)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0 and name
    ]
    if lists:
        return "candidates " + ", ".join(lists[:8])
    return f"modules {some(dict.fromkeys(name for name, _ in named_modules(model) if name))}"


def some(names: Iterable[str], limit: int = 12) -> str:
    """The first names as text, and how many there are in all."""
    names = list(names)
    return ", ".join(map(repr, names[:limit])) + (f" … ({len(names)} in all)" if len(names) > limit else "")


def text_config(model: nn.Module) -> Any:
    """The configuration of the part of the model that reads text; None without one."""
    config: Any = getattr(bare(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def named_by_model(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a method of the model inside all wrappers returns; None without such a method or module.

    transformers raises NotImplementedError for a model whose embeddings it does not know. Other classes may have a
    method of this name that needs arguments.
    """
    try:
        found = getattr(bare(model), getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds token ids, if the model names it."""
    return named_by_model(model, "get_input_embeddings")


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids that the model can embed, if known."""
    rows = getattr(input_embeddings(model), "num_embeddings", None)
    size = rows if isinstance(rows, int) else getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def position_limit(model: nn.Module) -> int | None:
    """Length of the longest sequence that the model accepts, if known."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and similar models count positions from padding_idx + 1, in a table that is longer by that number.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            return limit - padding - 1
    return limit


def tokens_ahead(model: nn.Module) -> int:
    """How many learnt tokens a model puts before every text, with PEFT's prompt tuning and p-tuning."""
    inside: nn.Module | None = model
    while inside is not None:
        config = getattr(inside, "active_peft_config", None) if is_transformers_model(inside) else None
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"):
            return int(getattr(config, "num_virtual_tokens", 0))
        inside = wrapped(inside)
    return 0


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's input: where FSDP computes, else that of its input embeddings or first parameter."""
    if (device := computed_on(model)) is not None:
        return device
    weight = getattr(input_embeddings(model), "weight", None)
    first = next(model.parameters(), None) if weight is None else weight
    if first is not None and first.is_meta:  # offloaded, so the device to which it is fetched
        hook = getattr(input_embeddings(model), "_hf_hook", None) or getattr(model, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return torch.device("cpu") if first is None else first.device


def dtype_of(model: nn.Module) -> str:
    """Name of the dtype in which the model computes: that of FSDP's casts, else of the first floating parameter."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    dtype = computed_in(model) or first
    return "none" if dtype is None else str(dtype).removeprefix("torch.")
