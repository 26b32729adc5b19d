"""What to measure in a LightningModule, and how to run the model as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ib_callback.common.errors import ModelError
from ib_callback.measuring.model import access
from ib_callback.measuring.model.access import Layers
from ib_callback.measuring.model.forward import Forward, OwnForward, default_forward

_KEYWORDS = ("hidden_states", "blocks")


@dataclass(frozen=True)
class Target:
    """What a Meter gets: the model, the modules of it to measure, and the call that runs it."""

    model: nn.Module
    layers: Layers
    forward: Forward


def find_target(trainer: Any, pl_module: Any, layers: Layers, forward: Forward | None) -> Target:
    """Find the only transformers model inside a LightningModule, or else take the LightningModule itself.

    Args:
        trainer: the Trainer. The forward pass uses its strategy and precision.
        pl_module: the LightningModule.
        layers: as given to the callback. Names are those inside the transformers model or, with the name of that model
            in front, those inside the LightningModule.
        forward: callable(pl_module, input_ids, attention_mask) as given to the callback, or None.

    Raises:
        ModelError: there are several transformers models, or nothing that can be called.
    """
    found = access.transformers_models(pl_module)
    names = None if callable(layers) or layers in _KEYWORDS else (layers,) if isinstance(layers, str) else tuple(layers)
    if names is not None:
        # If there are several models, the names tell which one is meant.
        named = {name: model for name, model in found.items() if all(p.startswith(f"{name}.") for p in names)}
        found = named or found
    if len(found) > 1 and (forward is None or names is None):
        raise ModelError(_which_of(pl_module, found))
    name, model = next(iter(found.items())) if len(found) == 1 else ("", pl_module)
    through = partial(_as_in_training, trainer, pl_module)
    call = (
        OwnForward(*(through(_own_call(pl_module, model, all_logits=every)) for every in (False, True)))
        if forward is None
        else through(partial(forward, pl_module))
    )
    if names is not None:
        inside = [pattern.removeprefix(f"{name}.") for pattern in names]
        model, layers = (model, inside) if _has(model, inside) else (pl_module, names)
    return Target(model, layers, call)


def _has(model: nn.Module, names: list[str]) -> bool:
    try:
        access.resolve_layers(model, names)
    except ModelError:
        return False
    return True


def _which_of(pl_module: nn.Module, found: dict[str, nn.Module]) -> str:
    models_found = ", ".join(f"{name} ({type(model).__name__})" for name, model in found.items())
    first = next(iter(found))
    return (
        f"{type(pl_module).__name__} holds {len(found)} transformers models: {models_found}. Expected one, or to be "
        f"told which: name its blocks with layers=['{first}.…'] (module names or globs), and if it is not to be "
        "called with input_ids and attention_mask, pass forward=callable(pl_module, input_ids, attention_mask)."
    )


def _own_call(pl_module: Any, model: nn.Module, *, all_logits: bool) -> Callable[[Tensor, Tensor], Any]:
    access.refuse_encoder_decoder(model)
    owner = getattr(type(model).forward, "__module__", None) or ""
    if model is pl_module and owner.split(".")[0] in ("torch", "lightning", "pytorch_lightning"):
        raise ModelError(
            f"{type(pl_module).__name__} holds no transformers model and has no forward() of its own. Pass "
            "forward=callable(pl_module, input_ids, attention_mask), and name what to measure with layers=[...]."
        )
    return partial(default_forward(model, all_logits=all_logits), model)


def _as_in_training(trainer: Any, pl_module: Any, call: Callable[[Tensor, Tensor], Any]) -> Forward:
    """`call` in the precision of training, with sharded parameters gathered."""
    outermost = trainer.strategy.model
    sharded = _is_sharded(outermost) or _is_sharded(pl_module)

    def forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with trainer.precision_plugin.forward_context():
            if not sharded:
                # The module inside DistributedDataParallel gives the same result without communication.
                return call(input_ids, attention_mask)
            return _through(outermost, pl_module, lambda: call(input_ids, attention_mask))

    return forward


def _is_sharded(module: Any) -> bool:
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__)


def _through(outermost: nn.Module, pl_module: Any, body: Callable[[], Any]) -> Any:
    """Run `body` in place of `pl_module.forward`, through a call of the outermost wrapper.

    The reason: sharded parameters that belong to no inner module are gathered only by a call of the outermost module.
    """
    missing = object()
    before = vars(pl_module).get("forward", missing)

    def put_back() -> None:
        if before is missing:
            vars(pl_module).pop("forward", None)
        else:
            pl_module.forward = before

    def forward() -> Any:
        put_back()  # the body may want to call the real one
        return body()

    pl_module.forward = forward
    try:
        return outermost()
    finally:
        put_back()


class Losses:
    """Mean training loss over the batches since `mean` was last called. Adding a loss waits for no device."""

    def __init__(self, total: float = 0.0, number: int = 0) -> None:
        self._sum: Any = total
        self._number = number

    def state(self) -> list[float | int]:
        """The arguments of `Losses`, for a checkpoint."""
        return [float(self._sum), self._number]

    def add(self, outputs: Any, accumulated: int = 1) -> None:
        """Add what `training_step` returned.

        Args:
            outputs: the `outputs` of `on_train_batch_end`.
            accumulated: number of accumulated batches, by which Lightning has divided the loss.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._sum = self._sum + loss.detach().float().reshape(()) * accumulated
            self._number += 1

    def mean(self) -> float | None:
        """The mean, in the unit of the loss; None without a batch. Afterwards the mean starts anew."""
        found = float(self._sum) / self._number if self._number else None
        self._sum, self._number = 0.0, 0
        return found
