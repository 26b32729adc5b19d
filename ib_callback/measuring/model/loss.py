"""The next-token loss of a model on a probe, and its next-token distributions, in passes that are made anyway.

There are two ways (*routes*) to the loss, and each model uses one. "head": the model's own forward pass is asked for
the logits of one token only. A hook on the trunk takes the last hidden states, and the model's own head makes logits of
a few of them at a time. This happens inside the forward pass, where parameters are gathered and on the device and under
the autocast that the head needs. "logits": the forward pass makes the logits of all tokens itself, and they are reduced
a few at a time. The route "head" is used if a trial shows that it gives the same loss as "logits". It may not, because
a model may scale or cap its logits after the head.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ib_callback.common.errors import RanksError
from ib_callback.common.messages import describe
from ib_callback.common.ranks import Kept, Ranks
from ib_callback.common.transfer import read, upload
from ib_callback.measuring.model import access, bidirectional, head
from ib_callback.measuring.model.forward import (
    Forward,
    Inputs,
    OwnForward,
    accident,
    is_out_of_memory,
    takes_few_logits,
)
from ib_callback.measuring.team import Team
from ib_callback.measuring.thinning import POSITIONS, neighbours
from ib_callback.probe.ngrams import Positions
from ib_callback.probe.probe import Probe

# The cost allowed for more than the least number of pairs, as a share of the trunk's forward passes.
SHARE = 0.1
# Number of logits that exist at a time (in float32, twice). With 50,000 rows, a head is a tenth faster with about 700
# positions at a time than with 170; a GPU needs more.
_AT_A_TIME = {"cpu": 1 << 25}
_ON_DEVICES = 1 << 26
# Number of logits that a CPU reduces at a time; repeated passes over more of them take a quarter longer.
_IN_CACHE = 1 << 18
# Number of tokens on which the two routes are compared, and the allowed difference of their mean losses.
_TRIED = 128
_AGREES = 1e-5
# An untrained model's logits are so small that a cap has no effect. So the states of a second copy of the sequence are
# scaled up until its largest logit reaches this size; rounding errors grow too.
_LARGE = 64.0
_AGREES_LARGE = 1e-3
_AGREES_LARGE_16_BITS = 0.05
# Threshold on the mean change of the logits with following tokens, as a share of their spread; rounding gives 1e-6.
_SEEN = 1e-3

Kind = Literal["head", "logits", "none"]


@dataclass(frozen=True)
class Route:
    """How the loss of a model is computed.

    kind: "head", "logits" or "none"; with "none", `why` gives the reason.
    is_failure: whether something went wrong; False if the model simply has no loss.
    """

    kind: Kind
    why: str = ""
    is_failure: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


class Routes:
    """The route of each model, as long as the model lives. A copy of this object starts empty."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, Route] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Routes], tuple[()]]:
        return Routes, ()

    def get(self, model: nn.Module) -> Route | None:
        """The route of an unwrapped model; None if unknown."""
        return self._known.get(model)

    def note(self, model: nn.Module, route: Route) -> Route:
        """Remember a route, unless it is a failure; return it."""
        if not route.is_failure:
            self._known[model] = route
        return route


def number_of_pairs(probe: Probe, model: nn.Module, *, every: bool) -> int:
    """Number of pairs of neighbouring real tokens for the loss: all, or as many as `SHARE` allows.

    It depends only on the probe and the architecture.
    """
    total = len(neighbours(probe))
    cost = None if every else head.relative_cost(model)
    if cost is None or cost <= SHARE:
        return total
    return min(total, max(POSITIONS, int(total * SHARE / cost)))


@dataclass(frozen=True)
class Distributions:
    """Which next-token distributions to compute, and how to group their tokens.

    positions: positions of the distributions.
    tokens: [G] ids that each form a group; all other tokens form one more group.
    """

    positions: Positions
    tokens: Tensor


class _Looked:
    """Positions at which logits are used, ascending: for losses, for distributions, and for either."""

    def __init__(self, probe: Probe, losses: Positions, distributions: Positions | None) -> None:
        width = probe.input_ids.shape[1]
        kinds = [losses] if distributions is None else [losses, distributions]
        places = [kind.sequence * width + kind.offset for kind in kinds]
        union = np.unique(np.concatenate(places))
        self.sequence, self.offset = np.divmod(union, width)
        self.for_loss = np.isin(union, places[0])
        self.for_distribution = np.zeros(len(union), bool) if distributions is None else np.isin(union, places[1])

    def within(self, sequences: slice) -> slice:
        """The slice of these positions that lies in the given sequences."""
        begin, end = np.searchsorted(self.sequence, [sequences.start, sequences.stop])
        return slice(int(begin), int(end))


class LossPass:
    """Adds up losses by sequence, and makes next-token distributions, over the forward passes of a measurement.

    Args:
        model: unwrapped model.
        probe: a probe that fits the model.
        pairs: first position of each pair of tokens whose loss is computed; empty without a loss.
        route: how to get the logits.
        distributions: the distributions to compute, if any.

    Attributes:
        sums: [N] sum of the losses of each sequence, in nats; after `settle`.
        counts: [N] number of pairs of each sequence; after `settle`.
        grouped: [P, G + 1] float32, grouped distributions of the last forward pass, in the order of its positions.
        failed: why the loss failed, if it did.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        pairs: Positions,
        route: Route,
        distributions: Distributions | None = None,
    ) -> None:
        self._model, self._probe, self.pairs, self.route = model, probe, pairs, route
        self._looked = _Looked(probe, pairs, None if distributions is None else distributions.positions)
        self._tokens = None if distributions is None else distributions.tokens
        self._highest = int(probe.input_ids.max())
        # Found once, because the search goes through all modules.
        self._trunk = head.trunk_of(model) if route.kind == "head" else None
        self._head = head.output_head(model) if route.kind == "head" else None
        self.begin()

    def begin(self) -> None:
        """Forget everything that was added, because the pass starts again."""
        self.sums = np.zeros(len(self._probe))
        self.counts = np.zeros(len(self._probe), np.int64)
        self.grouped = torch.empty(0)
        self._unread: list[tuple[slice, np.ndarray, np.ndarray, Tensor]] = []
        self.failed = self.route if self.route.kind == "none" else None
        self._kept = Kept()  # keeps a lack of memory inside a forward pass

    def agree(self, ranks: Ranks) -> None:
        """Make a failure on one rank a failure on all; call it after all ranks have run equally many passes."""
        found = ranks.first_failure(self.failed)
        self.failed = None if found is None else found[1]

    def share(self, ranks: Ranks) -> None:
        """Add the losses of the other ranks, which ran other sequences; every rank calls this after the last pass."""
        self.settle()
        if ranks.size == 1:
            return
        sums, counts = ranks.sums([torch.from_numpy(self.sums), torch.from_numpy(self.counts)])
        assert sums is not None
        assert counts is not None
        self.sums, self.counts = sums.numpy(), counts.to(torch.int64).numpy()

    def _tokens_on(self, device: torch.device) -> Tensor | None:
        if self._tokens is not None and self._tokens.device != device:
            self._tokens = self._tokens.to(device)
        return self._tokens

    @property
    def num_groups(self) -> int:
        """Number of groups of tokens in the distributions; the rest counts as one."""
        return 1 + (0 if self._tokens is None else len(self._tokens))

    @property
    def all_logits(self) -> bool:
        """Whether the forward is to make the logits of all tokens."""
        return self.route.kind == "logits"

    def wants(self, sequences: slice) -> bool:
        """Whether any position of these sequences is used, and nothing has failed."""
        here = self._looked.within(sequences)
        return self.failed is None and here.start < here.stop

    def run(self, call: Callable[[], Any], inputs: Inputs, sequences: slice) -> Any:
        """Make the forward pass `call` of these sequences, add their losses, and return its output."""
        here = self._looked.within(sequences)
        if not self.wants(sequences):
            return call()
        row, offset = self._looked.sequence[here] - sequences.start, self._looked.offset[here]
        shape = (inputs.ids.shape[0], inputs.ids.shape[1])
        targets = self._probe.input_ids.numpy()[sequences][row, offset + 1]
        wanted = np.flatnonzero(self._looked.for_distribution[here])
        at, of_loss, on_device = upload([row * shape[1] + offset, targets, wanted], inputs.ids.device)
        reduced = _Reduced(of_loss, wanted, on_device, self._tokens_on(on_device.device))
        times = 0

        def take(states: Tensor) -> None:
            nonlocal times
            times += 1
            self._of_states(states, at, reduced)

        if self.route.kind == "head":
            output = self._past_the_head(call, take, shape)
        else:
            output = call()
            times = 1
            self._survived(lambda: self._of_logits(output, at, reduced, shape))
        if self.failed is None and times != 1:
            self.failed = Route("none", f"the trunk ran {times} times in a forward pass", is_failure=True)
        if self.failed is None:
            counted = self._looked.for_loss[here]
            self._unread.append((sequences, row, counted, reduced.losses))
            self.grouped = reduced.grouped
        return output

    def settle(self) -> None:
        """Read the losses after the last pass; this waits for a GPU."""
        unread, self._unread = self._unread, []
        for (sequences, row, counted, _), losses in zip(unread, read([each[-1] for each in unread]), strict=True):
            of_pairs, length = losses.numpy().astype(np.float64)[counted], len(self.sums[sequences])
            self.sums[sequences] += np.bincount(row[counted], of_pairs, length)
            self.counts[sequences] += np.bincount(row[counted], minlength=length)

    def outcome(self) -> Route:
        """How the loss was computed in the end, or why not."""
        if self.failed is not None:
            return self.failed
        if not len(self._looked.sequence):
            return Route("none", "no sequence has two tokens")
        bad = int(self.counts[~np.isfinite(self.sums)].sum())
        if bad:
            return Route("none", f"the loss is not finite in sequences with {bad:,} of {len(self.pairs):,} pairs", True)
        return self.route

    def _past_the_head(self, call: Callable[[], Any], use: Callable[[Tensor], object], shape: tuple[int, int]) -> Any:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            self._kept(lambda: self._survived(lambda: use(head.states_in(output, shape))))

        assert self._trunk is not None  # because the route is "head"
        handle = self._trunk.register_forward_hook(take)
        try:
            output = call()
        finally:
            handle.remove()
        self._kept.release()
        return output

    def _survived(self, body: Callable[[], object]) -> None:
        """Run `body`; only a lack of memory may end the measurement, other errors end the loss."""
        if why := accident(body):
            self.failed = self.failed or Route("none", why, is_failure=True)

    def _of_states(self, states: Tensor, at: Tensor, reduced: _Reduced) -> None:
        states = states.flatten(0, 1).index_select(0, at.to(states.device))
        call = None if self._head is None else head.callable_alone(self._head)
        assert call is not None  # because the route is "head"
        for logits in _slices(call, states, rows_at_a_time(self._model, states.device)):
            reduced.add(logits)

    def _of_logits(self, output: Any, at: Tensor, reduced: _Reduced, shape: tuple[int, int]) -> None:
        logits = head.logits_in(output, self._model, shape, self._highest)
        if isinstance(logits, str):
            self.failed = Route("none", logits)
            return
        rows, at = logits.flatten(0, 1), at.to(logits.device)
        for some in at.split(max(1, _at_a_time(logits.device) // logits.shape[-1])):
            reduced.add(rows.index_select(0, some))


class _Reduced:
    """Reduces logits of a few positions at a time to losses, and to distributions at some of the positions.

    Args:
        targets: [n] the token that follows each position.
        wanted: [P] numbers of the positions whose distributions are computed, ascending.
        rows: `wanted` as a tensor on the device of the targets.
        tokens: `Distributions.tokens` on that device; None without distributions.
    """

    def __init__(
        self,
        targets: Tensor,
        wanted: np.ndarray | None = None,
        rows: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        self._targets, self._rows, self._tokens = targets, rows, tokens
        self._wanted = np.empty(0, np.int64) if wanted is None or tokens is None else wanted
        self._done = 0
        self._losses: list[Tensor] = []
        self._grouped: list[Tensor] = []

    def add(self, logits: Tensor) -> None:
        """Reduce the logits [m, V] of the next m positions."""
        # On a CPU so few at a time that they stay in the cache between passes over them.
        size = max(1, _IN_CACHE // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
        # Without the training's autocast, which could lower the precision.
        with torch.autocast(logits.device.type, enabled=False):
            for some in logits.split(size):
                self._add(F.log_softmax(some.float(), dim=-1))

    def _add(self, logs: Tensor) -> None:
        begin, end = self._done, self._done + len(logs)
        self._done = end
        self._losses.append(logs.gather(1, self._targets[begin:end, None].to(logs.device)))
        first, last = np.searchsorted(self._wanted, [begin, end])
        if first < last:
            assert self._rows is not None
            assert self._tokens is not None
            rows = self._rows[first:last, None].to(logs.device) - begin
            self._grouped.append(logs[rows, self._tokens.to(logs.device)])

    @property
    def losses(self) -> Tensor:
        """Losses [n], in nats."""
        return -torch.cat(self._losses)[:, 0]

    @property
    def grouped(self) -> Tensor:
        """Distributions [P, G + 1] at the wanted positions."""
        if not self._grouped:
            return torch.empty(0)
        logs = torch.cat(self._grouped)
        # In float64, because the rest, 1 minus the shares, may be small. MPS has no float64.
        shares = logs.to(torch.float32 if logs.device.type == "mps" else torch.float64).exp()
        rest = (1.0 - shares.sum(-1, keepdim=True)).clamp_min(0.0)
        return torch.cat([shares, rest], dim=-1).float()


def _at_a_time(device: torch.device) -> int:
    return _AT_A_TIME.get(device.type, _ON_DEVICES)


def rows_at_a_time(model: nn.Module, device: torch.device) -> int:
    """Number of states that are passed to the head at once."""
    return max(1, _at_a_time(device) // (access.vocabulary_size(model) or 1 << 17))


def _slices(call: Callable[[Tensor], Any], states: Tensor, size: int) -> Iterator[Tensor]:
    """Logits of states [n, dim], `size` states at a time."""
    for begin in range(0, len(states), size):
        logits = call(states[None, begin : begin + size])
        yield head.whole(logits)[0]


def _losses(call: Callable[[Tensor], Any], states: Tensor, targets: Tensor, size: int) -> Tensor:
    """[n] float32 losses of states [n, dim], `size` states at a time."""
    reduced = _Reduced(targets)
    for logits in _slices(call, states, size):
        reduced.add(logits)
    return reduced.losses


# --- the choice of the route


def find_route(model: nn.Module, probe: Probe, forward: Forward | None, team: Team | None = None) -> Route:
    """Find out how the loss of a model can be computed, with a trial on one sequence if needed.

    One forward pass makes the logits of all tokens of a sequence and, in the same batch, of copies of it. In one copy
    the states before the head are scaled up. Another copy has another second half, which shows whether the model reads
    ahead: whether it uses following tokens.

    Args:
        model: unwrapped model, in evaluation mode and without gradients.
        probe: a probe that fits the model.
        forward: as for `Meter`.
        team: the ranks that do the same; None: this process is alone.

    Raises:
        RanksError: the forward pass failed while ranks worked together.
    """
    call = forward or OwnForward.of(model)
    by_itself = isinstance(call, OwnForward)
    of_head = head.output_head(model) if by_itself and takes_few_logits(model) else None
    trial = None
    alone = None if of_head is None or head.trunk_of(model) is None else head.callable_alone(of_head)
    if alone is not None:
        trial = _Trial(alone, rows_at_a_time(model, access.device_of(model)))
    declared = bidirectional.is_declared(model)
    if trial is None and declared:
        return Route("logits")
    try:
        every = call.every if isinstance(call, OwnForward) else call
        within = (team or Team.alone()).forward()(every)
        return _tried(model, probe, within, trial, tries_order=not declared)
    except RanksError:
        raise
    except Exception as error:
        return Route("none", f"it could not be tried: {describe(error)}", is_failure=True)


def reads_ahead(model: nn.Module) -> Route:
    """The route of a model that uses following tokens: it has no next-token loss."""
    return Route("none", f"{type(access.bare(model)).__name__} reads the tokens that follow, so it predicts nothing")


def _tried(model: nn.Module, probe: Probe, forward: Forward, trial: _Trial | None, *, tries_order: bool) -> Route:
    row = int(probe.attention_mask.sum(1).argmax())
    ids = probe.input_ids[row][probe.attention_mask[row]].to(access.device_of(model))
    # The user's own `forward` may need sequences of one length.
    ids = ids[None] if trial is None else ids[None, :_TRIED]
    length = ids.shape[1]
    if length < 2:
        return Route("none", "no sequence has two tokens")
    half = (length + 1) // 2
    other = bidirectional.with_other_ending(ids, half - 1) if tries_order else None
    batch = torch.cat([ids, *([] if trial is None else [ids]), *([] if other is None else [other])])
    call = partial(forward, model, batch, torch.ones_like(batch))
    if trial is None:
        output = call()
    else:
        trunk = head.trunk_of(model)
        assert trunk is not None
        handle = trunk.register_forward_hook(partial(trial.see, ids[0], (len(batch), length)))
        try:
            output = call()
        finally:
            handle.remove()
        trial.raise_lack_of_memory()
    logits = head.logits_in(output, model, (len(batch), length), int(probe.input_ids.max()))
    if isinstance(logits, str):
        return Route("none", logits)
    if other is not None and _change(logits[0, :half], logits[-1, :half]) > _SEEN:
        return reads_ahead(model)
    if trial is None:
        return Route("logits")
    return Route("head" if trial.agrees_with(logits[:2], ids[0]) else "logits")


def _change(before: Tensor, after: Tensor) -> float:
    spread = float(before.double().std())
    change = float((before.double() - after.double()).abs().mean())
    return change / spread if spread > 0 else change


class _Trial:
    """Mean losses of a sequence by the route "head": of its states, and of the same states scaled up."""

    def __init__(self, call: Callable[[Tensor], Any], size: int) -> None:
        self._call, self._size = call, size
        self._means: list[list[float]] = []
        self._error: Exception | None = None

    def see(self, ids: Tensor, shape: tuple[int, int], module: nn.Module, inputs: Any, output: Any) -> None:
        """A hook on the trunk, for a batch that begins with two copies of a sequence; it scales the second one up."""
        if self._means or self._error is not None:
            self._error = self._error or RuntimeError("the trunk ran more than once")
            return
        try:
            states = head.states_in(output, shape)
            largest = float(self._call(states[None, 0])[0].abs().max())
            if 0.0 < largest < _LARGE:
                states[1] *= 2.0 ** math.ceil(math.log2(_LARGE / largest))  # a power of two is exact
            elif not largest > 0.0:
                raise ValueError("all logits are 0, so their effect on the output cannot be seen")
            self._means = [self._slicings(row, ids) for row in states[:2]]
        except Exception as error:  # must not leave a forward pass that ranks may make together
            self._error = error

    def raise_lack_of_memory(self) -> None:
        """Raise a lack of memory; call it after the forward pass."""
        if self._error is not None and is_out_of_memory(self._error):
            raise self._error

    def _slicings(self, states: Tensor, ids: Tensor) -> list[float]:
        """Mean losses with the states sliced as in a measurement, and in other ways."""
        states, targets = states[:-1], ids[1:]
        sizes = dict.fromkeys((self._size, len(states), (len(states) + 1) // 2, 1))
        return [float(_losses(self._call, states, targets, size).double().mean()) for size in sizes]

    def agrees_with(self, logits: Tensor, ids: Tensor) -> bool:
        """Whether the model's own logits [2, S, V] have the same mean losses."""
        if self._error is not None:
            return False
        is_16_bit = logits.dtype in (torch.bfloat16, torch.float16)
        floors = (_AGREES, _AGREES_LARGE_16_BITS if is_16_bit else _AGREES_LARGE)
        for own, means, floor in zip(logits, self._means, floors, strict=True):
            expected = float(_losses(lambda logits: logits, own[:-1], ids[1:], len(own)).double().mean())
            tolerance = max(floor, max(means) - min(means)) if is_16_bit else floor
            if not abs(means[0] - expected) <= tolerance:
                return False
        return True


# --- numbers


def loss_numbers(losses: LossPass, probe: Probe, group_bounds: np.ndarray | None) -> dict[str, Any]:
    """The fields of a `Measurement` about the loss.

    Args:
        losses: the losses after the last pass.
        probe: the probe of the pass.
        group_bounds: [G + 1] first sequence of each group that is left out in turn, and the end; None without standard
            errors.
    """
    if losses.outcome().kind == "none":
        return {}
    sums, counts = losses.sums, losses.counts
    mean = float(sums.sum() / counts.sum())
    together = _drawn_together(probe)
    drawn, weight = (np.bincount(together, values) for values in (sums, counts))
    used = int((weight > 0).sum())
    error = None
    if used > 1:
        scatter = float(((drawn - mean * weight) ** 2).sum())
        error = math.sqrt(used / (used - 1) * scatter) / int(counts.sum())
    found: dict[str, Any] = {
        "loss": mean,
        "loss_se": error,
        "bits_per_byte": mean * len(neighbours(probe)) / (probe.num_bytes * math.log(2)) if probe.num_bytes else None,
        "predictive_information": _entropy_of_next(probe) - mean,
    }
    if group_bounds is not None:
        left = [np.add.reduceat(values, group_bounds[:-1]) for values in (sums, counts)]
        left = [np.concatenate([one, one[:-1] + one[1:]]) for one in left]
        rest = [values.sum() - taken for values, taken in zip((sums, counts), left, strict=True)]
        if (rest[1] > 0).all():
            found["loss_jackknife"] = tuple((rest[0] / rest[1]).tolist())
    return found


def _drawn_together(probe: Probe) -> np.ndarray:
    """[N] a number shared by sequences that were drawn together: those of a source, or of a preference pair."""
    if probe.groups is not None:
        return np.unique(np.array(probe.groups), return_inverse=True)[1]
    paired = "preference" in probe.labels and len(probe) % 2 == 0
    return np.arange(len(probe)) // (2 if paired else 1)


def _entropy_of_next(probe: Probe) -> float:
    """Plug-in entropy of all tokens except the first of each sequence, in nats."""
    follows = probe.attention_mask[:, :-1] & probe.attention_mask[:, 1:]
    counts = torch.unique(probe.input_ids[:, 1:][follows], return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log()).sum())
