"""Check that the outputs of the layers found by rule are what the model itself returns as its hidden states.

The rule takes the shallowest list of the right length as the blocks. In some architectures that list is something else,
such as the attention of every layer. A model of transformers can return its hidden states, so it is run once on a few
tokens to compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ib_callback.common.errors import ModelError
from ib_callback.measuring.model import access
from ib_callback.measuring.model.access import Layer
from ib_callback.measuring.model.capture import states_of
from ib_callback.measuring.model.forward import Inputs, ProbeForward, default_forward, is_out_of_memory, takes
from ib_callback.measuring.model.head import whole
from ib_callback.measuring.plan.plan import Batch

# Number of tokens in this check: enough to tell any two modules apart.
TOKENS = 32

# Attributes in which a module keeps its hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def check_hidden_states(
    forward: ProbeForward, batches: Iterable[Batch], layers: Sequence[Layer], *, called: bool = False
) -> bool:
    """Compare the layers that `layers="hidden_states"` found with the model's `output_hidden_states=True`.

    Models that do not return hidden states are not checked. Returns whether this one does. A model that has not been
    `called` in this mode is called once before. Then the compared pass sets up only what hidden states need, and that
    is undone.

    Raises:
        ModelError: the states differ. The message says where, and which `layers=` measures what the model returns.
    """
    inputs = _first_tokens(forward.longest(batches))
    if not returns_hidden_states(forward.model):
        return False
    if not called:
        forward.call(inputs)
    seen: dict[nn.Module, list[Tensor | None]] = {}
    expected = hidden_states(forward.model, inputs, [layer.module for layer in layers], keep_in(seen))
    if expected is None:
        return False
    found = [states[0] if len(states := seen.get(layer.module, [])) == 1 else None for layer in layers]
    # Most models return the embeddings first. Some, such as Mamba, also return the last block before the final norm, or
    # return neither.
    choices = [[*expected[: len(layers) - 1], expected[-1]], expected[-len(layers) :]]
    wrong = [
        [layer.name for layer, states, own in zip(layers, found, choice, strict=False) if not alike(states, own)]
        for choice in choices
    ]
    if not 0 <= len(expected) - len(layers) <= 1 or all(wrong):
        raise ModelError(_explanation(forward.model, inputs, layers, wrong[-1], expected, found[-1]))
    return True


@contextmanager
def final_norm_reads_the_last_block(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """In the body's first forward, check the norm that was taken as the last layer because no trunk was found.

    Raises:
        ModelError: the input of the norm is not the output of the last block. The message says what to pass.
    """
    blocks = access.resolve_layers(model, "blocks")
    norm, last = layers[-1].module, blocks[-1].module
    if last in set(norm.modules()):
        yield
        return
    put_out: list[Any] = []
    reads: list[bool] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if not reads:
            put_out[:] = [output[0] if isinstance(output, (tuple, list)) and output else output]

    def compare(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        if not reads:
            given, block = next(iter((*inputs, *named.values())), None), put_out.pop() if put_out else None
            same = isinstance(given, Tensor) and isinstance(block, Tensor) and alike(given, block)
            reads.append(same)

    hooks = [last.register_forward_hook(keep), norm.register_forward_pre_hook(compare, with_kwargs=True)]
    try:
        yield
    except ModelError:
        if reads or not put_out:
            raise  # otherwise the norm did not run
    finally:
        for hook in hooks:
            hook.remove()
    if reads != [True]:
        name = next(name for name, module in access.named_modules(model) if module is norm)
        names = [block.name for block in blocks]
        raise ModelError(
            f'layers="hidden_states": {name!r} was taken for the final norm, but its input is not the output of '
            f"{names[-1]!r}. Pass layers={names!r} for the blocks alone, or add the module that follows them as the "
            "last name."
        )


def returns_hidden_states(model: nn.Module) -> bool:
    """Whether a model may accept `output_hidden_states=True`."""
    return access.is_transformers_model(access.bare(model)) and takes(model, "output_hidden_states")


def hidden_states(
    model: nn.Module, inputs: Inputs, modules: Iterable[nn.Module], look: Callable[[nn.Module, Tensor | None], None]
) -> list[Tensor] | None:
    """The model's own hidden states [B, S, dim], with the embeddings if the model includes them; None without any.

    Args:
        model: unwrapped model.
        inputs: the input of the model.
        modules: modules whose outputs are observed in the same pass.
        look: called whenever one of these modules runs, with the module and its states, or None if its output has no
            [B, S, dim].
    """
    options = {"output_hidden_states": True} | ({"return_dict": True} if takes(model, "return_dict") else {})
    shape, ahead = (inputs.ids.shape[0], inputs.ids.shape[1]), access.tokens_ahead(model)

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        look(module, states_of(output, shape, ahead))

    with hooks_put_back(model):
        for module in modules:
            table: Any = module._forward_hooks
            recording = [number for number, each in table.items() if _records(each)]
            module.register_forward_hook(hook)
            for number in recording:  # these run last, so changes that the user's hooks make enter both sides
                table.move_to_end(number)
        try:
            output = default_forward(model, **options)(model, inputs.ids, inputs.mask)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None  # it runs without the argument, which is enough for a measurement
    states = getattr(output, "hidden_states", None)
    if not isinstance(states, (tuple, list)) or not all(isinstance(each, Tensor) for each in states):
        return None
    texts = [states_of(each, shape, ahead) for each in states]
    return [own if text is None else text for own, text in zip(states, texts, strict=True)] or None


def _records(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers 5 collects hidden states."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@contextmanager
def hooks_put_back(model: nn.Module) -> Iterator[None]:
    """Restore the hooks of all modules, and the names of their attributes, at the end.

    When hidden states are requested for the first time, transformers 5 adds permanent hooks and an attribute that marks
    this.
    """
    before = [
        (module, {name: dict(vars(module).get(name, {})) for name in _HOOKS}, set(vars(module)))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for module, hooks, names in before:
            for kind, were in hooks.items():
                table = vars(module).get(kind, {})
                if list(table) != list(were):
                    table.clear()  # in place, because handles refer to the table
                    table.update(were)
            for name in set(vars(module)).difference(names):
                del vars(module)[name]


def keep_in(seen: dict[nn.Module, list[Tensor | None]]) -> Callable[[nn.Module, Tensor | None], None]:
    """Make a function that copies states to the host, by module: later parts of the model may overwrite them."""

    def look(module: nn.Module, states: Tensor | None) -> None:
        seen.setdefault(module, []).append(None if states is None else whole(states).to("cpu", copy=True))

    return look


def alike(states: Tensor | None, expected: Tensor) -> bool:
    """Whether states equal the expected ones, token by token; only their dtype may change on the way out.

    Both come from one pass, so only the rounding of that change is tolerated. In bfloat16 one block changes states by
    little more than rounding. Tokens are compared one by one, because a few with very large norms would dominate a sum.
    """
    if states is None or states.shape != expected.shape:
        return False
    states, expected = whole(states), whole(expected)
    own = expected.to(states.device, torch.float32)
    apart = (states.to(expected.dtype).float() - own).norm(dim=-1)
    # NaN counts as equal here, because the measurement reports it.
    return not bool((apart > 1e-6 * own.norm(dim=-1)).any())


def _first_tokens(inputs: Inputs) -> Inputs:
    """The first `TOKENS` real tokens of a sequence [1, S]."""
    first = int(inputs.mask[0].argmax())
    part = slice(first, first + TOKENS)
    return Inputs(inputs.ids[:, part], inputs.mask[:, part], inputs.positions[:0])


def modules_that_put_out(model: nn.Module, inputs: Inputs, number: int) -> list[list[str]]:
    """For each of the last `number` hidden states of a model, except its embeddings: names of modules that return it.

    This runs another pass, with hooks on all modules. Modules that run more than once are left out.
    """
    parts: dict[str, nn.Module] = {}
    for name, module in access.named_modules(model):
        if name:
            parts.setdefault(name, module)  # of a wrapper and its content, the one that is called
    embedding = access.input_embeddings(model)  # its output is not a layer
    seen: dict[nn.Module, list[Tensor | None]] = {}
    expected = hidden_states(model, inputs, parts.values(), keep_in(seen))
    if expected is None:
        return [[]] * number
    once = {name: seen[part][0] for name, part in parts.items() if len(seen.get(part, [])) == 1}
    found = [[name for name, states in once.items() if alike(states, own)] for own in expected[-number:]]
    return [names for names in found if embedding not in [parts[name] for name in names]]


def names_for_layers(model: nn.Module, matches: list[list[str]]) -> list[str]:
    """A name for each state that some module returns, in order; a single glob if that means the same."""
    names = [name for name, _ in access.named_modules(model)]
    found = [each for each in matches if each]
    return _chosen(found, [*dict.fromkeys(names)]) if found else []


def _chosen(matches: list[list[str]], names: list[str]) -> list[str]:
    """One name for each different state, from one list if possible; a single glob if that means the same."""
    patterns = [re.sub(r"(^|\.)0(?=\.|$)", r"\g<1>{}", name, count=1) for name in matches[0]]
    for pattern in sorted((each for each in patterns if "{}" in each), key=lambda each: each.count(".")):
        numbered = [pattern.format(i) for i in range(len(matches))]
        head, last = numbered[:-1], numbered[-1]
        if all(name in found for name, found in zip(head, matches, strict=False)):
            if last not in matches[-1]:
                return [*head, min(matches[-1], key=lambda name: name.count("."))]
            glob = pattern.format("*")
            same = [name for name in names if re.fullmatch(re.escape(pattern).replace(r"\{\}", r"[^.]*"), name)]
            return [glob] if same == numbered else numbered
    return [*dict.fromkeys(min(found, key=lambda name: name.count(".")) for found in matches)]  # one may be there twice


def _explanation(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[Layer],
    wrong: list[str],
    expected: list[Tensor],
    last: Tensor | None,
) -> str:
    kind = type(access.bare(model)).__name__
    found = f"{layers[0].name!r} … {layers[-1].name!r}"
    if not 0 <= len(expected) - len(layers) <= 1:
        differ = f"are {len(layers)}, but output_hidden_states=True of {kind} returns {len(expected)} states"
    else:
        differ = f"output other states than output_hidden_states=True of {kind} returns (at {access.some(wrong, 4)})"
    text = f'layers="hidden_states": the layers found, {found}, {differ}.'
    number = len(layers) if len(expected) == len(layers) else len(expected) - 1
    matches = modules_that_put_out(model, inputs, number)
    named = names_for_layers(model, matches)
    if matches and all(matches):
        return f"{text} Pass layers={named!r}, which outputs what the model returns."
    shapes = sorted({str(tuple(states.shape)) for states in expected if states.ndim != 3})
    why = "Not all of the model's states are outputs of modules that run once"
    if shapes:
        why = f"Expected states of shape [sequences, tokens, dim], got {' and '.join(shapes)}"
    if not named and last is not None:
        named = [name for name, module in access.named_modules(model) if module is layers[-1].module and name]
    left = f"layers={named!r} measures the others" if named else "Name modules with such an output in layers=[...]"
    return f"{text} {why}. {left}."


def suggestion(forward: ProbeForward, batches: Iterable[Batch]) -> str:
    """For a model without blocks that were found: the layers= that measures its hidden states; "" if unknown."""
    if not returns_hidden_states(forward.model):
        return ""
    inputs = _first_tokens(forward.longest(batches))
    states = hidden_states(forward.model, inputs, [], lambda module, states: None)
    matches = modules_that_put_out(forward.model, inputs, len(states)) if states else []
    named = names_for_layers(forward.model, matches)
    return f" layers={named!r} measures the returned hidden states that are outputs of modules." if named else ""
