"""Whether hidden states see the tokens that follow, as those of an encoder do, and what then becomes of the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# Mean total variation of the assignments, in [0, 1]. In a causal model it is 0, but for rounding (1e-7 in float32) if
# it sorts tokens by expert; in an untrained BERT it is 0.1, in one of 16 dimensions 0.002.
SEEN = 1e-4


def is_declared(model: torch.nn.Module) -> bool:
    """Whether all attention in a model says of itself that it is causal, as in most decoders of transformers."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(causal is True for causal in said)


def with_other_ending(input_ids: Tensor, position: int) -> Tensor | None:
    """A copy of a sequence [1, S] with other tokens after `position`; None if all its tokens are one."""
    changed = input_ids.clone()
    changed[:, position + 1 :] = input_ids[0, 0]
    return None if torch.equal(changed, input_ids) else changed


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether assignments [T, L, num_bins] at positions before the changed ending differ beyond rounding."""
    return float((a - b).abs().sum(-1).mean()) / 2 > SEEN


def explanation(model: torch.nn.Module) -> str:
    """What to make of measurements of such a model."""
    return (
        f"the hidden states of {type(model).__name__} change with the tokens that follow: its attention is "
        "bidirectional. Complexity and expressivity are then both information about tokens that the model has read: "
        "expressivity is no longer what it can say of what comes next, and neither optimality nor distance to the "
        "bound is about prediction. Entropy and the information about features keep their meaning."
    )
