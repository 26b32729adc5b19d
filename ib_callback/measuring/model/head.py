"""The output head of a model: where it is, what it costs, and whether the output of a forward pass is its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ib_callback.common.errors import ModelError
from ib_callback.measuring.model import access


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns the last hidden states into logits, as named by the model inside all wrappers."""
    return access.named_by_model(model, "get_output_embeddings")


def trunk_of(model: nn.Module) -> nn.Module | None:
    """The module that makes the last hidden states; None if unknown."""
    try:
        return access.resolve_layers(model, "hidden_states")[-1].module
    except ModelError:
        return None


def callable_alone(head: nn.Module) -> Callable[[Tensor], Any] | None:
    """A function that calls the head inside the forward pass of its model, any number of times; None if impossible.

    It is impossible with FSDP1 and DeepSpeed, because they gather parameters in an order that they have seen before.
    FSDP2 counts the calls of modules that it gathers together, so its hooks are bypassed; if the head is gathered by
    itself, that is done first.
    """
    if type(head).__name__ == "FullyShardedDataParallel" or any(hasattr(p, "ds_id") for p in head.parameters()):
        return None
    if not type(head).__name__.startswith("FSDP"):
        return head

    def gathered(states: Tensor) -> Any:
        sharded: Any = head
        if any(hasattr(parameter, "to_local") for parameter in head.parameters()):
            sharded.unshard()
        return head.forward(states)

    return gathered


def whole(tensor: Any) -> Tensor:
    """The whole of a tensor. If it is split over several ranks, all of them must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def relative_cost(model: nn.Module) -> float | None:
    """Number of parameters of the head divided by that of the trunk; None without a head, or if only shards are known.

    Each parameter counts once. The trunk is the model without its input embeddings and the head.
    """
    head = output_head(model)
    if head is None or any(hasattr(module, "_handle") for module in model.modules()):  # FSDP1
        return None
    embeddings = access.input_embeddings(model)
    of_head = {id(parameter) for parameter in head.parameters()}
    other = set() if embeddings is None else {id(p) for p in embeddings.parameters()}
    sizes = {id(p): int(getattr(p, "ds_numel", p.numel())) for p in model.parameters()}  # a DTensor counts as a whole
    trunk = sum(size for number, size in sizes.items() if number not in of_head | other)
    own = sum(size for number, size in sizes.items() if number in of_head)
    return own / trunk if trunk else None if own == 0 else float("inf")


def states_in(output: Any, shape: tuple[int, int] | None = None, ahead: int = 0) -> Tensor:
    """The states [B, S, dim] in the output of the trunk; `shape` is B and S, if known.

    `ahead`: number of learnt tokens before the text; their states are left out.

    Raises:
        ValueError: the output contains no states.
    """
    states = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    states = output[0] if states is None else states
    states = states if shape is None else _of_text(states, shape[1], ahead)
    if states.ndim != 3 or tuple(states.shape[:2]) != (shape or tuple(states.shape[:2])):
        expected = ", ".join(map(str, shape or ("B", "S")))
        raise ValueError(f"expected states [{expected}, dim] of the trunk, got {list(states.shape)}")
    states = whole(states)
    return states.detach()


def _of_text(rows: Tensor, length: int, ahead: int) -> Tensor:
    """The part [B, S, …] of a tensor [B, ahead + S, …]; any other tensor unchanged."""
    return rows[:, ahead:] if ahead and rows.ndim == 3 and rows.shape[1] == ahead + length else rows


def logits_in(output: Any, model: nn.Module, shape: tuple[int, int], highest: int) -> Tensor | str:
    """The logits [B, S, V] of all positions in the output of a forward pass; or the reason, as text, if there are none.

    Hidden states are tensors too. So an unnamed tensor, or the first of several, counts as logits only if its last
    dimension is the number of rows, and not of columns, of an embedding.

    Args:
        output: output of the forward pass.
        model: unwrapped model.
        shape: B and S.
        highest: the highest token id of the probe.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = named
    if found is None and not isinstance(output, Mapping):
        found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return f"{type(access.bare(model)).__name__} outputs no logits"
    found = _of_text(found, shape[1], access.tokens_ahead(model))
    size = list(found.shape)
    if found.ndim != 3 or tuple(size[:2]) != shape:
        return f"the logits, {size}, are not those of every token, [{shape[0]}, {shape[1]}, vocabulary]"
    if size[2] not in _vocabularies(model, named=named is not None) or size[2] <= highest:
        what = "logits do not fit the vocabulary"
        if named is None:
            what = "output cannot be distinguished from hidden states"
        return f"the {what}: {size[2]} numbers a token"
    return whole(found)


def _vocabularies(model: nn.Module, *, named: bool) -> set[int]:
    """Possible sizes of the last dimension of logits."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not named:
        return {t.num_embeddings for t in tables} - {t.embedding_dim for t in tables}
    head = output_head(model)
    weight = getattr(head, "weight", None)
    own = {len(weight)} if isinstance(weight, Tensor) and weight.ndim == 2 else set()
    rows = access.vocabulary_size(model)
    return own | ({t.num_embeddings for t in tables} if rows is None else {rows})
