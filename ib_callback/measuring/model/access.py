"""Finding in a model what is measured: its blocks, its trunk, and its limits."""

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

# Where wrappers of torch.compile, FSDP, activation checkpointing and Lightning Fabric keep what they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")

Layers = str | Iterable[str] | Callable[[nn.Module], Iterable[nn.Module]]


@dataclass(frozen=True)
class Layer:
    """A module whose output is measured, and the name under which it is reported."""

    name: str
    module: nn.Module


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers for data parallelism and compilation, whose forward is that of the inside.

    Calling the inside of DistributedDataParallel, or of DeepSpeed's engine, needs no communication of theirs and gives
    the same result.

    Raises:
        TypeError: it is no module.
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
    """Whether accelerate fetches a module's own parameters, from the host's memory or a disk, for each of its calls."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def without_parallelism(model: nn.Module) -> nn.Module:
    """`unwrap` of what is known to be a model with values."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or _hands_on(model):
            inside: Any = model.module
        else:
            # Not by getattr: FSDP looks up what it lacks in what it wraps, and must not be bypassed.
            inside = dict(model._modules.items()).get("_orig_mod")  # TorchScript's table has no get
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def _hands_on(model: nn.Module) -> bool:
    """Whether a model is an engine of DeepSpeed that does nothing in its forward but book-keeping of the training."""
    if not any(base.__name__ == "DeepSpeedEngine" for base in type(model).__mro__):
        return False
    autocasts: Any = getattr(model, "torch_autocast_enabled", None)
    return not (callable(autocasts) and autocasts())


def wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, one level down or, for PEFT, the base model; None if the module is no wrapper.

    A part that is called `module` is taken for what is wrapped if it is the only part and all arguments are handed on,
    as in DistributedDataParallel, DataParallel, DeepSpeed's engine and AveragedModel: a model may use that name too.
    """
    get_base: Any = getattr(type(module), "get_base_model", None)
    if callable(get_base):  # PEFT
        try:
            base = get_base(module)
        except Exception:
            return None  # something else of that name
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
    """The model inside all wrappers, which has the configuration; not always to be called by itself."""
    while (inside := wrapped(model)) is not None:
        model = inside
    return model


def transformers_models(module: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The transformers models inside a module by name, those that are part of another one left out."""
    if is_transformers_model(module) or is_transformers_model(bare(module)):
        # A sharded one has to be called through its wrapper.
        return {name: without_parallelism(module)}
    found: dict[str, nn.Module] = {}
    for child_name, child in module.named_children():
        found |= transformers_models(child, f"{name}.{child_name}" if name else child_name)
    return found


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers or peft."""
    # By name, so that neither package is imported for a model that has nothing to do with it.
    bases = {(base.__module__.split(".")[0], base.__name__) for base in type(module).__mro__}
    return ("transformers", "PreTrainedModel") in bases or ("peft", "PeftModel") in bases


def is_own_class(model: nn.Module) -> bool:
    """Whether the forward of a model was written in transformers itself."""
    return getattr(type(model).forward, "__module__", "").startswith("transformers.")


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` under the names of the model without wrappers: a wrapper has the name of its inside."""
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
    """The modules to measure, in the order of the forward pass as far as the model's own order tells.

    Args:
        model: unwrapped model.
        layers: `"hidden_states"` (output of every block, the last after the final norm, as in
            `output_hidden_states=True` without the embeddings), `"blocks"` (raw block outputs), module names or
            globs, or a callable model → modules. In a model without a configuration the blocks are the one
            outermost list of modules that have parts, and the final norm is the last one behind it. Names are those
            of the model without wrappers; those with them are understood, and reported without.

    Raises:
        ModelError: nothing was found; lists candidates.
    """
    if isinstance(layers, str) and layers in ("hidden_states", "blocks"):
        trunk, blocks = _find_blocks(model)
        if layers == "blocks":
            return blocks
        # hidden_states[-1] is by definition the trunk's own output, after the final norm where there is one.
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
            named.setdefault(name, Layer(name, module))  # of a wrapper and its inside, what is called by its parent
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
    """Whether a dotted name matches a glob part by part: `h.*` is `h.0` but not `h.0.attn`."""
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
    """What makes the hidden states, which is the decoder, the base model or the model itself, and its blocks."""
    refuse_encoder_decoder(model)
    base: Any = bare(model)
    number = getattr(text_config(model), "num_hidden_layers", None)
    names = {module: name for name, module in named_modules(model)}
    decoder = getattr(base, "get_decoder", None)
    inside = getattr(base, getattr(base, "base_model_prefix", ""), None)
    # Some models call a part of their head "decoder"; what has the blocks is what is meant.
    candidates: tuple[Any, ...] = (decoder() if callable(decoder) else None, inside, base)
    for trunk in candidates:
        stack = _stack(trunk, number)
        if stack is not None:
            name = names[stack]
            headed = trunk is base and named_by_model(model, "get_output_embeddings") is not None
            if headed:
                # It has a name for the rest that does not hold: its trunk is the part with the blocks.
                trunk = next((part for part in base.children() if stack in part.modules() and part is not stack), base)
            if isinstance(trunk, nn.ModuleDict) or (trunk is base and (headed or not is_own_class(base))):
                return _plain_trunk(model, name, stack)  # what is called puts out logits, or may
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
    """Lists of modules that have parts themselves, by name; not those inside another one, such as heads in a block.

    A ModuleList of one counts where there is no longer list.
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
    """The last norm beside a list of blocks, or else beside what holds it; None without one."""
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
    """The blocks of a list, and the norm behind them, or without one the last block."""
    blocks = [Layer(f"{name}.{i}", block) for i, block in enumerate(stack.children())]
    norm = _norm_behind(model, name, stack)
    return blocks[-1].module if norm is None else norm[1], blocks


def _layers_of(model: nn.Module, name: str, stack: nn.Module) -> list[str]:
    """The same as names to pass."""
    norm = _norm_behind(model, name, stack)
    if norm is None:
        return [f"{name}.*"]
    return [*(f"{name}.{i}" for i in range(len(list(stack.children())) - 1)), norm[0]]


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raise a ModelError for a model with two stacks, each with tokens of its own; its encoder alone is none."""
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
    """The list of `number` blocks; the shallowest one, for a block may itself hold a list of the same length."""
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
    """The first of the names, and how many there are."""
    names = list(names)
    return ", ".join(map(repr, names[:limit])) + (f" … ({len(names)} in all)" if len(names) > limit else "")


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that reads text; None without one."""
    config: Any = getattr(bare(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def named_by_model(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a method of the model inside all wrappers returns; None without such a method, or such a part.

    transformers raises NotImplementedError for a model whose embeddings it does not know; other classes may have a
    method of this name that wants arguments.
    """
    try:
        found = getattr(bare(model), getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds token ids, if the model says."""
    return named_by_model(model, "get_input_embeddings")


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids that the model can embed, if it says."""
    rows = getattr(input_embeddings(model), "num_embeddings", None)
    size = rows if isinstance(rows, int) else getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def position_limit(model: nn.Module) -> int | None:
    """Longest sequence that the model takes, if it says."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1 on, in a table that is that much longer.
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding, int):
            return limit - padding - 1
    return limit


def tokens_ahead(model: nn.Module) -> int:
    """How many learnt tokens a model puts before every text: those of PEFT's prompt tuning and p-tuning."""
    inside: nn.Module | None = model
    while inside is not None:
        config = getattr(inside, "active_peft_config", None) if is_transformers_model(inside) else None
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        if kind in ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"):
            return int(getattr(config, "num_virtual_tokens", 0))
        inside = wrapped(inside)
    return 0


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its input and computes: where FSDP does, or its input embeddings or first parameter are."""
    if (device := computed_on(model)) is not None:
        return device
    weight = getattr(input_embeddings(model), "weight", None)
    first = next(model.parameters(), None) if weight is None else weight
    if first is not None and first.is_meta:  # offloaded: where it is fetched to
        hook = getattr(input_embeddings(model), "_hf_hook", None) or getattr(model, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return torch.device("cpu") if first is None else first.device


def dtype_of(model: nn.Module) -> str:
    """Name of the dtype in which the model computes: to which FSDP casts parameters, or of the first floating one."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    dtype = computed_in(model) or first
    return "none" if dtype is None else str(dtype).removeprefix("torch.")
