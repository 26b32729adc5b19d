"""Whether hidden states depend on following tokens, as in an encoder, and what this means for the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ib_callback.measuring.model import access
from ib_callback.measuring.model.access import Layer
from ib_callback.measuring.model.forward import ProbeForward
from ib_callback.measuring.plan.plan import Batch

# Threshold on the mean total variation of the assignments, in [0, 1]. In a causal model it is 0, or rounding (1e-7 in
# float32) if the model sorts tokens by expert. In an untrained BERT it is 0.1, in one with 16 dimensions 0.002.
SEEN = 1e-4


def sees_what_follows(forward: ProbeForward, batches: Iterable[Batch], layers: Sequence[Layer]) -> bool:
    """Whether states change with following tokens: runs one sequence twice, the second time with another second half.

    Models that declare themselves causal are believed. Models outside transformers are not tried, because their forward
    may remember earlier calls.
    """
    model = forward.model
    if is_declared(model) or not access.is_own_class(access.bare(model)):
        return False
    whole = forward.longest(batches)
    inputs = replace(whole, positions=whole.positions[: (len(whole.positions) + 1) // 2])
    changed = with_other_ending(inputs.ids, int(inputs.positions[-1]))
    if changed is None:
        return False
    before, after = (forward.once(replace(inputs, ids=ids), layers) for ids in (inputs.ids, changed))
    return float((before - after).abs().sum(-1).mean()) / 2 > SEEN


def is_declared(model: torch.nn.Module) -> bool:
    """Whether all attention modules of a model declare themselves causal, as in most decoders of transformers."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(causal is True for causal in said)


def with_other_ending(input_ids: Tensor, position: int) -> Tensor | None:
    """A copy of a sequence [1, S] with other tokens after `position`; None if all its tokens are the same."""
    changed = input_ids.clone()
    changed[:, position + 1 :] = input_ids[0, 0]
    return None if torch.equal(changed, input_ids) else changed


def explanation(model: torch.nn.Module) -> str:
    """How to interpret measurements of such a model, for a warning."""
    return (
        f"the hidden states of {type(model).__name__} change with the tokens that follow: its attention is "
        "bidirectional. The model has then read the tokens of both complexity and expressivity. So expressivity, "
        "optimality and distance to the bound do not describe prediction. Entropy and the information about features "
        "keep their meaning."
    )
