"""Run a model on a probe: how to call it, what to pass, and passes with hooks on its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ib_callback.common.errors import ModelError, RanksError
from ib_callback.common.messages import describe
from ib_callback.common.ranks import Kept, Ranks
from ib_callback.common.transfer import upload
from ib_callback.measuring.model import access
from ib_callback.measuring.model.access import Layer
from ib_callback.measuring.model.capture import Capture, Moments, Quantiser
from ib_callback.measuring.plan.plan import Batch
from ib_callback.measuring.team import Round, Team
from ib_callback.probe.probe import Probe

Forward = Callable[[nn.Module, Tensor, Tensor], Any]


@dataclass(frozen=True)
class Inputs:
    """The input of one forward pass: ids and mask [B, S], and [T] flat numbers of the positions to quantise."""

    ids: Tensor
    mask: Tensor
    positions: Tensor


class Losses(Protocol):
    """The interface of an object that adds up losses of forward passes (loss.py)."""

    @property
    def all_logits(self) -> bool:
        """Whether the forward is to make the logits of all tokens."""

    def wants(self, sequences: slice) -> bool:
        """Whether any position of these sequences is used."""

    def agree(self, ranks: Ranks) -> None:
        """Make a failure on one rank a failure on all."""

    def run(self, call: Callable[[], Any], inputs: Inputs, sequences: slice) -> Any:
        """Make the forward pass `call` of these sequences, add their losses, and return its output."""


class ProbeForward:
    """Forward passes of one model over one probe.

    Args:
        model: unwrapped model.
        probe: a probe that fits the model (`check_fit`).
        quantiser: makes assignments of states.
        forward: callable(model, input_ids, attention_mask) that runs the model; None: the model's own call.
        losses: adds up losses of the passes of `over` and `beside`.
        team: the ranks that share the passes; None: this process alone makes them.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        quantiser: Quantiser,
        forward: Forward | None = None,
        losses: Losses | None = None,
        team: Team | None = None,
    ) -> None:
        self.model = model
        self._team = team or Team.alone()
        self._probe, self._quantiser, self._losses = probe, quantiser, losses
        self._call = forward or OwnForward.of(model)
        if isinstance(self._call, OwnForward) and losses is not None and losses.all_logits:
            self._call = self._call.every
        self._device = access.device_of(model)
        self._ahead = access.tokens_ahead(model)
        self.autocast = ""  # the autocast of the last pass, e.g. ", autocast bfloat16"

    def over(
        self,
        rounds: Iterable[Round[Batch]],
        layers: Sequence[Layer],
        use: Callable[[Round[Batch], Tensor | None], object],
        kept: Kept,
        *,
        centers: Sequence[Tensor] | None = None,
        moments: Moments | None = None,
    ) -> None:
        """Run this rank's batch of each round, and pass its assignments (`Capture.run`) to `use`.

        The next batch overwrites the assignments. Every rank makes the same number of forward passes. A rank without a
        batch runs the first one of the round, and passes None to `use`, as does a rank that has failed. Failures are
        kept; a process that measures alone raises them.
        """
        with Capture(layers, self._quantiser, centers=centers, moments=moments, ahead=self._ahead) as capture:
            for batches in rounds:
                use(batches, self._own(capture, batches, kept))
                if self._team.is_alone:
                    kept.release()
            kept(capture.check_usable)
            if self._team.is_alone:
                kept.release()

    def _own(self, capture: Capture, batches: Round[Batch], kept: Kept) -> Tensor | None:
        own, first = batches[self._team.crew], batches[0]
        # The ranks of a crew run the same batch, even if one of them has failed.
        batch = first if own is None else own
        assert batch is not None

        def run() -> Tensor | None:
            with self._team.forward():
                inputs = self._inputs(batch.sequences, batch.width, batch.positions)
            if own is not None and not failed:
                return self._run(capture, inputs, batch.sequences)
            self.call(inputs)
            return None

        failed = self._failed_here(kept)
        return kept(run)

    def _failed_here(self, kept: Kept) -> bool:
        """Whether something failed on a rank of this crew; its hooks may communicate, too."""
        together = self._team.together
        if self._losses is not None and together.size > 1:
            self._losses.agree(together)
        return any(together.of_every(kept.error is not None))

    def beside(self, batches: Iterable[Batch], batch_size: int, kept: Kept) -> None:
        """Run the sequences that these batches leave out, for their losses only."""
        if self._losses is None:
            return
        done = np.zeros(len(self._probe), bool)
        for batch in batches:
            done[batch.sequences] = True
        left = np.flatnonzero(~done)
        parts = []
        for neighbours in np.split(left, np.flatnonzero(np.diff(left) != 1) + 1):
            for begin in range(0, len(neighbours), batch_size):
                part = neighbours[begin : begin + batch_size]
                sequences = slice(int(part[0]), int(part[-1]) + 1)
                if self._losses.wants(sequences):
                    parts.append(sequences)
        for some in self._team.rounds(parts):
            kept(partial(self._beside, self._losses, some[self._team.crew], some[0]))
            if self._team.is_alone:
                kept.release()

    def _beside(self, losses: Losses, own: slice | None, first: slice | None) -> None:
        sequences = first if own is None else own
        assert sequences is not None
        if self._team.together.size > 1:
            losses.agree(self._team.together)
        width = int(self._probe.attention_mask[sequences].any(0).nonzero().max()) + 1
        inputs = self._inputs(sequences, width, torch.empty(0, dtype=torch.long))
        if own is None:
            self.call(inputs)
        else:
            losses.run(partial(self.call, inputs), inputs, sequences)

    def moments(self, rounds: Iterable[Round[Batch]], layers: Sequence[Layer], kept: Kept) -> Moments:
        """Run the batches only for the moments of states; return the moments of this rank's batches."""
        moments = Moments(len(layers))
        with Capture(layers, None, moments=moments, ahead=self._ahead) as capture:
            for batches in rounds:
                self._own(capture, batches, kept)
                if self._team.is_alone:
                    kept.release()
            kept(capture.check_usable)
            if self._team.is_alone:
                kept.release()
        return moments

    def alone(self, sequences: Tensor, width: int) -> None:
        """Run sequences, cut to a width, for hooks that were registered elsewhere."""
        self.call(self._inputs(sequences, width, torch.empty(0, dtype=torch.long)))

    def once(self, inputs: Inputs, layers: Sequence[Layer]) -> Tensor:
        """Assignments [T, L, num_bins] from a single separate pass."""
        with Capture(layers, self._quantiser, ahead=self._ahead) as capture:
            assignments = self._run(capture, inputs)
            capture.check_usable()
            return assignments

    def longest(self, batches: Iterable[Batch]) -> Inputs:
        """The longest sequence of the widest batch, alone."""
        batch = max(batches, key=lambda batch: batch.width)
        row = int(self._probe.attention_mask[batch.sequences].sum(1).argmax())
        first = batch.sequences.start + row
        positions = batch.positions[batch.positions // batch.width == row] % batch.width
        return self._inputs(slice(first, first + 1), batch.width, positions)

    def _inputs(self, sequences: slice | Tensor, width: int, positions: Tensor) -> Inputs:
        rows = sequences.numpy() if isinstance(sequences, Tensor) else sequences
        ids = self._probe.input_ids.numpy()[rows, :width]
        mask = self._probe.attention_mask.numpy()[rows, :width].astype(np.int64)
        return Inputs(*upload([ids, mask, positions], self._device))

    def call(self, inputs: Inputs) -> Any:
        """Run the model, for hooks that were registered elsewhere, and return its output."""
        with self._team.forward():
            return self._call(self.model, inputs.ids, inputs.mask)

    def _run(self, capture: Capture, inputs: Inputs, sequences: slice | None = None) -> Tensor:
        shape = (inputs.ids.shape[0], inputs.ids.shape[1])

        def forward() -> Any:
            return self.call(inputs)

        losses = self._losses
        with_losses = (
            forward if losses is None or sequences is None else partial(losses.run, forward, inputs, sequences)
        )
        assignments = capture.run(with_losses, inputs.positions, shape)
        self.autocast = capture.autocast
        return assignments


@dataclass(frozen=True)
class OwnForward:
    """The model's own call in two forms: `one` asks for the logits of one token, `every` for those of all tokens."""

    one: Forward
    every: Forward

    @classmethod
    def of(cls, module: nn.Module) -> OwnForward:
        """The calls that `default_forward` makes."""
        return cls(default_forward(module), default_forward(module, all_logits=True))

    def __call__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Call the model for the logits of one token, with the arguments of a user's own `forward`."""
        return self.one(model, input_ids, attention_mask)


def takes_few_logits(module: nn.Module) -> bool:
    """Whether a model can return the logits of one token only."""
    return "logits_to_keep" in _arguments(module)[0]


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a model's forward takes an argument of this name, or passes it on to something that may take it."""
    names, open_ended = _arguments(module)
    return argument in names or open_ended


def default_forward(module: nn.Module, *, all_logits: bool = False, **further: Any) -> Forward:
    """The call of `module` itself with ids and mask: without a cache, and with the logits of one token if possible.

    Arguments are passed by name if the class takes the name, or passes `**kwargs` on to something that takes it. A
    model without `attention_mask` is called with the ids only; sequences with padding are then an error. With
    `all_logits` it returns the logits of all tokens. `further` arguments are passed on unchanged.
    """
    if not _classifies(module):
        return _default_forward(module, all_logits, further)
    inside = _default_forward(module, True, further)  # the model itself picks the logits of the last token
    if getattr(access.text_config(module), "pad_token_id", 0) is not None:
        return inside
    return lambda model, input_ids, attention_mask: _with_padding_token(inside, model, input_ids, attention_mask)


def _classifies(module: nn.Module) -> bool:
    """Whether a model of transformers returns logits of the last token that is not padding, as reward models do.

    Without a padding token such a model refuses batches.
    """
    kind = access.bare(module)
    return access.is_transformers_model(kind) and type(kind).__name__.endswith("ForSequenceClassification")


def _with_padding_token(call: Forward, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
    """Call the model while its configuration names a padding token that no text has.

    This changes only the output of the classification head, which is not used.
    """
    config = access.text_config(model)
    config.pad_token_id = -1
    try:
        return call(model, input_ids, attention_mask)
    finally:
        config.pad_token_id = None


def _default_forward(module: nn.Module, all_logits: bool, further: dict[str, Any]) -> Forward:
    names, open_ended = _arguments(module)
    known = {"use_cache": False} | ({} if all_logits else {"logits_to_keep": 1})
    options = {name: value for name, value in known.items() if name in names} | further
    if "attention_mask" in names or open_ended:
        return lambda model, input_ids, attention_mask: model(input_ids, attention_mask=attention_mask, **options)

    def without_mask(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Any:
        if not attention_mask.all():
            raise ModelError(
                f"{type(module).__name__}.forward takes no attention_mask, but the probe has padding. Pass "
                "forward=callable(model, input_ids, attention_mask), or a probe whose sequences have one length."
            )
        return model(input_ids, **options)

    return without_mask


def _arguments(module: nn.Module | None) -> tuple[set[str], bool]:
    """Names that `module.forward` takes, and whether it takes any other name too.

    A forward with `**kwargs` is assumed to pass them on: to its base classes, and from the last one to the module that
    it wraps.
    """
    names: set[str] = set()
    while module is not None:
        # The forwards of the classes: mixed-precision libraries patch that of the instance and hide its signature.
        for base in type(module).__mro__:
            if "forward" not in vars(base) or base is nn.Module:
                continue
            parameters = inspect.signature(vars(base)["forward"]).parameters.values()
            names |= {parameter.name for parameter in parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                return names, False
        module = access.wrapped(module)
    return names, True


def check_fit(model: nn.Module, probe: Probe) -> None:
    """Raise a ModelError for token ids outside the model's vocabulary, or for sequences that are too long for it."""
    vocabulary = access.vocabulary_size(model)
    highest = int(probe.input_ids.max())
    if vocabulary is not None and highest >= vocabulary:
        raise ModelError(
            f"probe {probe.name!r}: token id {highest} is outside the model's vocabulary of {vocabulary} "
            f"(expected ids 0 … {vocabulary - 1}). Make the probe with this model's own tokenizer."
        )
    limit = access.position_limit(model)
    length = int(probe.attention_mask.any(0).nonzero().max()) + 1
    ahead = access.tokens_ahead(model)
    if limit is not None and length + ahead > limit:
        learnt = f", and {ahead} of these are learnt tokens before the text" if ahead else ""
        raise ModelError(
            f"probe {probe.name!r}: sequences are {length} tokens long, but the model takes at most {limit} "
            f"(max_position_embeddings){learnt}. Make the probe with max_length={limit - ahead} or less "
            "(in commands --max-length)."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator raises a plain RuntimeError.
    text = str(error)
    return "out of memory" in text.lower() or "can't allocate memory" in text


def accident(body: Callable[[], object]) -> str:
    """Run code that must not end a measurement, and return what went wrong; "" if nothing did.

    A lack of memory is raised, because smaller batches help.
    """
    try:
        body()
    except RanksError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return describe(error)
    return ""


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device; None if unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as file:  # Linux; MemAvailable includes memory that caches would release
                available = next(line for line in file if line.startswith("MemAvailable:"))
            return int(available.split()[1]) * 1024
        except (OSError, StopIteration, ValueError):
            return None
    return None
