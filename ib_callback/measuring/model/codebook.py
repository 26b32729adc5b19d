"""Codebooks of the output: frequent tokens of the probe take the place of random reference points.

The readout compares states with the output embeddings of these tokens. The prediction uses their predicted
probabilities as assignments.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ib_callback.common.messages import describe
from ib_callback.common.ranks import Kept
from ib_callback.common.transfer import read, upload
from ib_callback.estimator.quantise import assign, resolve_temperature
from ib_callback.measuring.accumulate import Sums
from ib_callback.measuring.model import access, head
from ib_callback.measuring.model.forward import accident, free_memory, is_out_of_memory
from ib_callback.measuring.model.loss import LossPass, rows_at_a_time
from ib_callback.measuring.plan.plan import Batch, Plan
from ib_callback.measuring.team import Round, SharedAccumulator, Team
from ib_callback.probe.probe import Probe

# Number of reference points, which is also that of bins.
NUMBER = 100
# Bytes of states that may be held until their mean is known.
KEPT = 2 << 30
# If the states of a probe exceed that, the mean is taken over every EVERY-th sequence, in separate forward passes.
EVERY = 20
# States stay on their device if they take less than 1/_SMALL_SHARE of its free memory. A copy to the host would make
# every batch wait, for as long as a tenth of a small model's forward pass.
_SMALL_SHARE = 8
# A state nearer to the mean than this share of its norm has no usable direction from it.
_AT_THE_MEAN = 1e-5
# Allowed difference between the logits of a sum of vectors and the sum of their logits: the rounding of 8 bits.
_LINEAR = 0.05


def frequent_tokens(probe: Probe, number: int) -> Tensor:
    """Up to `number` ids of the most frequent real tokens of a probe; if equally frequent, lower ids come first.

    >>> frequent_tokens(Probe.from_tokens(torch.tensor([[7, 5, 5, 9, 9, 3]])), 3)
    tensor([5, 9, 3])
    """
    ids, counts = torch.unique(probe.input_ids[probe.attention_mask], return_counts=True)
    order = torch.sort(counts, descending=True, stable=True).indices
    return ids[order[:number]]


def output_rows(model: nn.Module, module: nn.Module, tokens: Tensor, states: Tensor) -> Tensor | str:
    """The vectors [G, dim], float32, with which the output head multiplies states for each token; or why not.

    Call it inside the forward pass of the model, when its parameters are in place. For a plain linear layer these are
    rows of its weight. For any other head, such as one with adapters or quantised weights, they are computed from its
    logits of unit vectors. The result is a text if they cannot be determined.

    Args:
        model: unwrapped model.
        module: its output head.
        tokens: [G] ids.
        states: [..., dim], an example of the head's input.
    """
    weight = _plain_weight(module)
    if weight is not None and weight.shape[1] != states.shape[-1]:
        return f"its states have {states.shape[-1]} dimensions, and its output embeddings {weight.shape[1]}"
    if weight is not None and weight.shape[0] <= int(tokens.numpy().max()):
        return _too_few(weight.shape[0], tokens)
    if weight is None:
        call = head.callable_alone(module)
        if call is None:
            return f"its output head, {type(module).__name__}, cannot be read during a forward pass"
        return _rows_by_calls(model, call, tokens, states)
    if type(module).__name__.startswith("FSDP") and hasattr(weight, "to_local"):
        sharded: Any = module
        sharded.unshard()
        weight = sharded.weight
    return _rows_of(weight, tokens).detach().float()


def _too_few(number: int, tokens: Tensor) -> str:
    """Say if the head has too few rows. Checked first, because reading a missing row breaks a GPU for the whole run."""
    return f"its output head has {number:,} rows, but the probe has the token {int(tokens.max())}"


def _plain_weight(module: nn.Module) -> Any:
    """The weight of an unmodified linear layer, which may be sharded; None for any other module."""
    weight: Any = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not is_linear or weight.ndim != 2:
        return None
    # Tensor parallelism replaces the forward of a module; other subclasses of Tensor hold quantised numbers.
    is_whole = type(weight) in (Tensor, nn.Parameter) and "forward" not in vars(module)
    return weight if is_whole or hasattr(weight, "device_mesh") else None


def _rows_of(weight: Any, tokens: Tensor) -> Tensor:
    if not hasattr(weight, "device_mesh"):
        return weight[tokens.to(weight.device)]
    from torch.distributed.tensor import DTensor, Replicate

    # Each rank looks up the rows that it holds.
    replicated = [Replicate()] * weight.device_mesh.ndim
    ids: Any = DTensor.from_local(tokens.to(weight.device), weight.device_mesh, replicated, run_check=False)
    found: Any = nn.functional.embedding(ids, weight)
    return found.full_tensor()


def _rows_by_calls(model: nn.Module, call: Callable[[Tensor], Any], tokens: Tensor, states: Tensor) -> Tensor | str:
    dim, size = states.shape[-1], rows_at_a_time(model, states.device)

    def all_logits(states: Tensor) -> Tensor:
        return head.whole(call(states[None]))[0]

    def logits(states: Tensor) -> Tensor:
        found = all_logits(states)
        return found.float()[:, tokens.to(found.device)]

    of_zero = all_logits(states.new_zeros(1, dim))
    if of_zero.shape[1] <= int(tokens.max()):
        return _too_few(of_zero.shape[1], tokens)
    offset = of_zero.float()[:, tokens.to(of_zero.device)]
    parts = []
    for begin in range(0, dim, size):
        unit = states.new_zeros(min(size, dim - begin), dim)
        unit[torch.arange(len(unit)), begin + torch.arange(len(unit))] = 1.0
        parts.append(logits(unit) - offset)
    rows = torch.cat(parts).T
    together = logits(states.new_ones(1, dim))[0] - offset[0]
    if not float((together - rows.sum(1)).norm()) <= _LINEAR * float(together.norm()):
        return "its output head is not linear"
    return rows


@dataclass(frozen=True)
class Outcome:
    """The result of a pass with a codebook of the output.

    plan: the plan of the pass.
    num_bins: number of bins of its assignments.
    sums: the sums of the pass; None if there are none, for the reason `why`.
    is_failure: whether something went wrong; False if the model simply has no such view.
    told: entries for the settings of the measurement.
    """

    plan: Plan
    num_bins: int
    sums: Sums | None
    why: str
    is_failure: bool
    told: dict[str, Any]


def dim_of(module: nn.Module | None) -> int:
    """Dimension of the states that an output head takes; 0 if unknown."""
    known, weight = getattr(module, "in_features", None), getattr(module, "weight", None)
    if isinstance(known, int):
        return known
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 2 else 0


class Readout:
    """Assigns the last layer's states, after the final norm, to the output embeddings of frequent tokens.

    The mean state is removed from the states, and the mean embedding from the embeddings. Then states and embeddings
    are compared in the same way as states and random points: by cosines and a softmax at the calibrated temperature.
    States wait until their mean is known, in the precision of the model. So one pass is enough, and the mean is exactly
    that of all positions. They wait on their GPU if they take little of its free memory, otherwise on the host. If they
    would take more than 2 GiB, the mean is taken over every twentieth sequence, in forward passes before the main pass.

    Use it as a context manager around forward passes; after each, `take` its states.

    Args:
        model: unwrapped model.
        plan: the plan of the probe.
        tokens: [G] ids, at least 2.
        weighting: weights of the labels, as for `Meter`.
        limit: bytes of states that may wait.
        team: the ranks that share the passes; None: this process alone.
        num_layers: number of layers that are accumulated in the same pass; it decides which rank accumulates this.
        device: device for accumulating; None: that of the states.
        may_wait_there: whether states may wait on their GPU, if they take little of its free memory.

    Attributes:
        why: the reason that there is no readout; "" if there is one.
        is_failure: whether something went wrong; False if the model simply has no readout.
        mean: [dim] float64, the mean state; None until it is known.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        tokens: Tensor,
        *,
        weighting: str,
        limit: int = KEPT,
        team: Team | None = None,
        num_layers: int = 0,
        device: torch.device | None = None,
        may_wait_there: bool = False,
    ) -> None:
        self._team, self._device = team or Team.alone(), device
        self._waits_there: bool | None = None if may_wait_there else False
        self._columns = self._team.beside(num_layers)
        self._kept = Kept()
        self._model, self._plan, self._tokens, self._weighting, self._limit = model, plan, tokens, weighting, limit
        self._trunk, self._head = head.trunk_of(model), head.output_head(model)
        self.why, self.is_failure = "", False
        if self._head is None:
            self.why = f"{type(access.bare(model)).__name__} has no output embeddings"
        elif self._trunk is None:
            self.why = f"the last hidden states of {type(access.bare(model)).__name__} are not known"
        elif len(tokens) < 2:
            self.why = "the probe has one token only"
        self._points: Tensor | None = None
        self._hooks = ExitStack()
        self._output: list[Tensor] = []
        self._waiting: list[tuple[Round[Batch], Tensor | None]] = []
        self._total: Tensor | None = None
        self._count = 0
        self._accumulator: SharedAccumulator | None = None
        self._mean_of = "all positions"
        self.mean: Tensor | None = None
        self._mean_there: Tensor | None = None  # float32, on the device of the points

    def __enter__(self) -> Readout:
        if not self.why and self._trunk is not None:
            self._hooks.callback(self._trunk.register_forward_hook(self._see).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # Inside the forward, because all ranks must take part in gathering states that are split over ranks.
        self._kept(lambda: self._survived(lambda: self._output.append(head.states_in(output))))
        # Not again after a lack of memory: ranks that have their points already would not take part.
        if self._points is None and not self.why and self._kept.error is None:
            self._kept(lambda: self._survived(partial(self._find_points, output)))

    def _find_points(self, output: Any) -> None:
        assert self._head is not None
        states = head.states_in(output)
        found = output_rows(self._model, self._head, self._tokens, states)
        if isinstance(found, str):
            self.why = found
            return
        rows = (found.cpu() if found.device.type == "mps" else found).double()
        points = rows - rows.mean(0)
        norms, lengths = (torch.linalg.vector_norm(each, dim=-1) for each in (points, rows))
        finite, apart = read([lengths.isfinite().all(), (norms > _AT_THE_MEAN * lengths).all()])
        if not finite.numpy():
            self.why, self.is_failure = "its output embeddings are not finite", True
        elif not apart.numpy():
            self.why = "its output embeddings are zero or all alike"
        else:
            self._points = (points / norms[:, None]).float().to(states.device)

    def look(self, run: Callable[[Tensor, int], object]) -> None:
        """Find the mean beforehand if states may not wait; `run` makes the forward of sequences, cut to a width.

        The choice of sequences does not depend on the batch size.
        """
        if self.why or self._fits():
            return
        batches = self._plan.batches
        sequence = torch.cat([batch.sequences.start + batch.positions // batch.width for batch in batches])
        offset = torch.cat([batch.positions % batch.width for batch in batches])
        width = max(batch.width for batch in batches)
        size = max(batch.sequences.stop - batch.sequences.start for batch in batches)

        def run_own(round_: Round[Tensor]) -> None:
            some, first = round_[self._team.crew], round_[0]
            assert first is not None
            run(first if some is None else some, width)
            if some is None:
                self._output = []
                return
            here = torch.isin(sequence, some)
            rows = self._states((len(some), width), torch.searchsorted(some, sequence[here]) * width + offset[here])
            if rows is not None:
                self._add_to_mean(rows)

        for some in self._team.rounds(sequence.unique()[::EVERY].contiguous().split(size)):
            self._kept(partial(run_own, some))
            if self._team.is_alone:
                self._kept.release()
        self._settle()
        self._share_mean()
        if self._total is not None and not self.why:
            self.mean, self._mean_of = self._total / self._count, f"{self._count:,} positions"
            self._begin()

    def _agree(self) -> None:
        """Make a failure on one rank a failure on all; raise a lack of memory."""
        self._team.ranks.agree_on(self._kept)
        found = self._team.ranks.first_failure((self.why, self.is_failure) if self.why else None)
        self.why, self.is_failure = ("", False) if found is None else found[1]

    def _share_mean(self) -> None:
        if self._total is not None:
            (self._total,) = read([self._total])
        self._total, count = self._team.peers.sums([self._total, torch.tensor(self._count)])
        assert count is not None
        self._count = int(count)

    def _begin(self) -> None:
        """Make room for histograms, on all ranks."""
        self._accumulator = self._kept(
            lambda: SharedAccumulator(
                self._plan,
                self._columns,
                len(self._tokens),
                weighting=self._weighting,
                device=self._device or (access.device_of(self._model) if self._points is None else self._points.device),
                team=self._team,
                kept=self._kept,
            )
        )
        self._team.ranks.agree_on(self._kept)

    def memory(self) -> int:
        """Bytes of histograms."""
        return self._plan.memory(1, len(self._tokens))

    def waiting(self) -> int:
        """Bytes of the states that wait for their mean."""
        return self._size() if self._fits() else 0

    def _fits(self) -> bool:
        return self._size() <= self._limit

    def _size(self) -> int:
        if self.why:
            return 0
        itemsize = 2 if access.dtype_of(self._model) in ("float16", "bfloat16") else 4
        return self._plan.num_positions * dim_of(self._head) * itemsize

    def take(self, batches: Round[Batch], ran: bool) -> None:
        """Take the states of this rank's batch of a round, if it `ran`."""
        batch = batches[self._team.crew]
        rows = None
        if batch is not None and ran:
            rows = self._kept(partial(self._rows, batch))
        self._output = []
        if self.mean is None:
            self._waiting.append((batches, rows))
        else:
            self._add(batches, rows)
        self._survive()
        if self._team.is_alone:
            self._kept.release()

    def _rows(self, batch: Batch) -> Tensor | None:
        """The states of a batch, on the device where they are quantised or wait for the mean."""
        rows = self._states((batch.sequences.stop - batch.sequences.start, batch.width), batch.positions)
        if rows is None or self.mean is not None:
            return rows
        self._add_to_mean(rows)
        if self._waits_there is None:
            free = free_memory(rows.device) if rows.device.type == "cuda" else None
            self._waits_there = free is not None and _SMALL_SHARE * self._size() <= free
        return rows if self._waits_there else rows.to("cpu")

    def _states(self, shape: tuple[int, int], positions: Tensor) -> Tensor | None:
        outputs, self._output = self._output, []
        if self.why:
            return None
        if len(outputs) != 1:
            self.why, self.is_failure = f"the trunk ran {len(outputs)} times in a forward pass", True
            return None
        found: list[Tensor] = []

        def gather() -> None:
            rows = head.states_in(outputs[0], shape, access.tokens_ahead(self._model)).flatten(0, 1)
            found.append(rows.index_select(0, *upload([positions], rows.device)))

        self._survived(gather)
        return found[0] if found else None

    def _add_to_mean(self, rows: Tensor) -> None:
        total = rows.sum(0, dtype=torch.float64) if rows.device.type != "mps" else rows.float().sum(0).cpu().double()
        self._total = total if self._total is None else self._total + total
        self._count += len(rows)

    def _add(self, batches: Round[Batch], rows: Tensor | None) -> None:
        assert self._accumulator is not None
        assignments = None
        if rows is not None and not self.why:
            assignments = self._kept(partial(self._assigned, rows))
        self._accumulator.add(batches, assignments)

    def _assigned(self, rows: Tensor) -> Tensor:
        """Assignments [T_b, 1, G]."""
        assert self._points is not None
        assert self.mean is not None
        device = self._points.device
        if self._mean_there is None:
            self._mean_there = self.mean.to(device, torch.float32)
        rows = rows.to(device).float()
        away = rows - self._mean_there
        temperature = resolve_temperature("calibrated", rows.shape[-1], len(self._tokens))
        assignments, norms = assign(away, self._points, temperature)
        at_the_mean = norms <= _AT_THE_MEAN * torch.linalg.vector_norm(rows, dim=-1)
        return assignments.masked_fill_(at_the_mean[:, None], 1.0 / len(self._tokens))[:, None]

    def outcome(self) -> Outcome:
        """The result after the last batch; call it only once."""
        sums = self._sums()
        told = {"why": self.why} if self.why else {"tokens": len(self._tokens), "mean": self._mean_of}
        return Outcome(self._plan, len(self._tokens), sums, self.why, self.is_failure, told)

    def _sums(self) -> Sums | None:
        self._settle()
        if not self.why and self.mean is None:
            self._share_mean()
            self.mean = None if self._total is None else torch.from_numpy(self._total.numpy() / self._count)
            if self._total is None or not np.isfinite(self._total.numpy()).all():
                self.why, self.is_failure = "states are not finite", True
        waiting, self._waiting = self._waiting, []
        if not self.why and waiting:
            self._begin()
            for batches, rows in waiting:
                self._add(batches, rows)
            self._settle()
        if self.why or self._accumulator is None:
            return None
        sums = self._kept(self._accumulator.sums)
        if sums is not None and not np.isfinite(sums.kept.numpy()[self._plan.total]).all():
            self.why, self.is_failure = "states are not finite", True
        self._settle()
        return None if self.why else sums

    def _settle(self) -> None:
        self._survive()
        self._agree()

    def _survive(self) -> None:
        if (error := self._kept.error) is not None and not is_out_of_memory(error):
            self._kept.error = None
            self.why, self.is_failure = self.why or describe(error), True

    def _survived(self, body: Callable[[], object]) -> None:
        """Run `body`; only a lack of memory may end the measurement, other errors end the readout."""
        if why := accident(body):
            self.why, self.is_failure = self.why or why, True


class Prediction:
    """Accumulates next-token distributions, grouped into frequent tokens and the rest, as soft assignments.

    Args:
        plan: the plan of the positions with distributions.
        losses: makes them, in each forward pass.
        weighting: of labels.
        device: where to accumulate.
        team, num_layers: as of `Readout`.

    Attributes:
        why, is_failure: as of `Readout`.
    """

    def __init__(
        self,
        plan: Plan,
        losses: LossPass,
        *,
        weighting: str,
        device: torch.device,
        team: Team | None = None,
        num_layers: int = 0,
    ) -> None:
        self._plan, self._losses, self._device = plan, losses, device
        self._team = team or Team.alone()
        self._kept = Kept()
        self._accumulator = SharedAccumulator(
            plan, self._team.beside(num_layers), losses.num_groups,
            weighting=weighting, device=device, team=self._team, kept=self._kept,
        )  # fmt: skip
        self._batches = {batch.sequences.start: batch for batch in plan.batches}
        self._bad = ""
        self._is_finite: Tensor | None = None  # of all distributions so far

    def __enter__(self) -> Prediction:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def look(self, run: Callable[[Tensor, int], object]) -> None:
        """Do nothing: a prediction needs no mean."""

    @property
    def why(self) -> str:
        """The reason that there is no prediction; "" if there is one."""
        return self._bad or ("" if self._losses.failed is None else self._losses.failed.why)

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong; False if the model simply has no prediction."""
        return bool(self._bad) or (self._losses.failed is not None and self._losses.failed.is_failure)

    def take(self, batches: Round[Batch], ran: bool) -> None:
        """Take the distributions of this rank's batch of a round, if it `ran`."""
        own = [None if batch is None else self._batches.get(batch.sequences.start) for batch in batches]
        assignments = None
        if ran and own[self._team.crew] is not None and not self.why:
            assignments = self._kept(self._assigned)
        self._accumulator.add(own, assignments)
        self._settle()
        if self._team.is_alone:
            self._kept.release()

    def _assigned(self) -> Tensor:
        """Assignments [P, 1, G + 1] of the last forward pass."""
        grouped = self._losses.grouped.to(self._device)
        finite = grouped.isfinite().all()
        self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        return grouped[:, None]

    def _settle(self) -> None:
        if (error := self._kept.error) is not None and not is_out_of_memory(error):
            self._kept.error = None
            self._bad = self._bad or describe(error)

    def outcome(self) -> Outcome:
        """The result after the last batch; call it only once."""
        ranks = self._team.ranks
        ranks.agree_on(self._kept)  # raises a lack of memory on all ranks
        if self._is_finite is not None and not read([self._is_finite])[0].numpy():
            self._bad = self._bad or "logits are not finite"
        found = ranks.first_failure((self.why, self.is_failure) if self.why else None)
        why, is_failure = ("", False) if found is None else found[1]
        sums = None if why else self._kept(self._accumulator.sums)
        ranks.agree_on(self._kept)
        told = {"why": why} if why else {"positions": self._plan.num_positions, "groups": self._losses.num_groups}
        return Outcome(self._plan, self._losses.num_groups, sums, why, is_failure, told)
