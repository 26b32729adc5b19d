"""How several ranks share the work of a measurement. All ranks of a measurement together are its *team*.

Each layer has its own sums. So each of R ranks runs every R-th batch of the plan. In each round, one exchange sends
every rank the assignments of its own layers in all R batches. The rank adds them up in the order of the plan, as one
process alone would do.

Ranks that make a forward pass together, such as those of a tensor-parallel group, form a *crew*. They run the same
batch, and all of them hold its states. So each takes its own layers without an exchange. Different crews run different
batches. Usually every rank is a crew of its own, and the exchange is among all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from ib_callback.common.errors import RanksError
from ib_callback.common.messages import describe
from ib_callback.common.ranks import Kept, Ranks
from ib_callback.measuring.accumulate import Accumulator, Sums
from ib_callback.measuring.plan.memory import own_work
from ib_callback.measuring.plan.plan import Batch, Plan

Thing = TypeVar("Thing")
# What each crew does in one round; None if nothing is left for it.
Round = Sequence[Thing | None]


class Team:
    """The ranks that share a measurement.

    Args:
        ranks: all ranks of the measurement.
        crews: for each crew, the numbers of its ranks; all crews have the same size.
        in_step: whether forward passes of different crews wait for each other, as with sharded models.

    Attributes:
        num_crews: number of crews D; they run batches at the same time.
        crew: number of this rank's crew.
        peers: the ranks with the same place in their crews, in the order of the crews.
        together: the ranks of this rank's crew.
    """

    def __init__(self, ranks: Ranks, crews: Sequence[Sequence[int]] | None = None, *, in_step: bool = False) -> None:
        self.ranks = ranks
        crews = [[number] for number in range(ranks.size)] if crews is None else crews
        self._crews = crews
        self.num_crews, self._size = len(crews), len(crews[0])
        self.crew, self._place = next(
            (number, crew.index(ranks.rank)) for number, crew in enumerate(crews) if ranks.rank in crew
        )
        self._in_step = in_step or self._size > 1
        members = ranks.numbers()
        whole = self._size == 1
        self.peers = ranks if whole else Ranks.of([members[crew[self._place]] for crew in crews])
        self.together = Ranks.alone() if whole else Ranks.of([members[rank] for rank in crews[self.crew]])

    @classmethod
    def alone(cls) -> Team:
        """A team of this process alone."""
        return cls(Ranks.alone())

    @property
    def is_alone(self) -> bool:
        """Whether the team is one process."""
        return self.ranks.size == 1

    def rounds(self, things: Sequence[Thing]) -> Iterator[Round[Thing]]:
        """Deal things out to the crews, one for each crew in each round, in order.

        >>> list(Team.alone().rounds("ab"))
        [('a',), ('b',)]
        """
        for begin in range(0, len(things), self.num_crews):
            some = things[begin : begin + self.num_crews]
            yield (*some, *[None] * (self.num_crews - len(some)))

    def shares(self, number: int) -> list[range]:
        """For each rank, which of `number` layers it accumulates: neighbouring layers, evenly distributed."""
        size = self.ranks.size
        bounds = [rank * number // size for rank in range(size + 1)]
        shares = [range(*pair) for pair in pairwise(bounds)]
        # The layers of peers, which exchange with each other, are side by side.
        order = [crew[place] for place in range(self._size) for crew in self._crews]
        return [shares[order.index(rank)] for rank in range(size)]

    def by_layer(self, number: int) -> list[int]:
        """The ranks in the order of their layers."""
        shares = self.shares(number)
        return sorted(range(self.ranks.size), key=lambda rank: (shares[rank].start, shares[rank].stop, rank))

    def beside(self, number: int) -> list[list[int]]:
        """For each rank, its columns of a table with one extra column.

        A rank with the fewest of the `number` layers takes that column.
        """
        shares = self.shares(number)
        least_busy = min(range(self.ranks.size), key=lambda rank: (len(shares[rank]), -rank))
        return [[0] if rank == least_busy else [] for rank in range(self.ranks.size)]

    def of_peers(self, by_rank: Sequence[Thing]) -> list[Thing]:
        """Select the entries of the peers, in their order, from one entry for each rank."""
        return [by_rank[crew[self._place]] for crew in self._crews]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Wrap the model's own forward pass: if other ranks wait inside it, no rank can go on after a failure."""
        try:
            yield
        except RanksError:
            raise
        except Exception as error:
            if self.is_alone or not self._in_step:
                raise
            raise RanksError(
                f"rank {self.ranks.rank}: the model failed in a forward pass of the measurement while the ranks were "
                f"exchanging data, so the other ranks cannot go on: {describe(error)}. If memory ran out, pass a "
                "smaller batch_size= to the callback or Meter."
            ) from error


def crews_of(together: Sequence[Sequence[int]], members: Sequence[int]) -> list[list[int]]:
    """The crews, as numbers of ranks; one crew of all ranks if the crews would differ in size.

    Args:
        together: for each rank, the processes that make its forward passes with it, if any, as numbers among all
            processes.
        members: the number of each rank among all processes.

    Raises:
        ValueError: a process that takes part in a forward pass is not among the ranks.

    >>> crews_of([(4, 6), (5, 7), (4, 6), (5, 7)], [4, 5, 6, 7])
    [[0, 2], [1, 3]]
    """
    number = {member: rank for rank, member in enumerate(members)}
    missing = sorted({each for crew in together for each in crew} - number.keys())
    if missing:
        raise ValueError(
            f"process_group: expected all ranks that make the model's forward together, got a group of {members} "
            f"without {missing}. Leave process_group out, or pass a group that contains them."
        )
    crews = sorted({tuple(sorted(number[each] for each in crew)) or (rank,) for rank, crew in enumerate(together)})
    evenly = len({len(crew) for crew in crews}) == 1 and sum(map(len, crews)) == len(members)
    return [list(crew) for crew in crews] if evenly else [list(range(len(members)))]


class SharedAccumulator:
    """An Accumulator of this rank's own columns, fed with the assignments of all ranks.

    It allocates all memory for exchanges at the start, because a rank that fails must still take part in the remaining
    rounds. The failure is kept, and nothing is accumulated after it.

    Args:
        plan: the plan of the probe.
        columns: for each rank, the columns of the assignments that it accumulates.
        num_bins, weighting, device: as for `Accumulator`.
        team: the ranks.
        kept: collects failures.
    """

    def __init__(
        self,
        plan: Plan,
        columns: Sequence[Sequence[int]],
        num_bins: int,
        *,
        weighting: str,
        device: torch.device,
        team: Team,
        kept: Kept,
    ) -> None:
        self._team, self._num_bins, self._kept, self._device = team, num_bins, kept, device
        own = len(columns[team.ranks.rank])
        self._own = (own, num_bins)
        self._accumulator = Accumulator(plan, own, num_bins, weighting=weighting, device=device) if own else None
        if team.is_alone:
            return
        self._columns = [torch.tensor(list(each), device=device, dtype=torch.long) for each in team.of_peers(columns)]
        positions = sorted((len(batch.positions) for batch in plan.batches), reverse=True)
        rows_sent, rows_received = positions[0], sum(positions[: team.num_crews])
        self._sent = torch.zeros(rows_sent * sum(map(len, self._columns)) * num_bins, device=device)
        self._received = torch.zeros(rows_received * own * num_bins, device=device)

    def add(self, batches: Round[Batch], assignments: Tensor | None) -> None:
        """Add a round. All ranks call this, each with the assignments of its own batch.

        Args:
            batches: batch of each crew, from the plan.
            assignments: [T_b, columns, num_bins] of this rank's batch; None if it has no batch or failed.
        """
        if self._team.is_alone:
            if batches[0] is not None and assignments is not None:
                self._add(batches[0], assignments)
            return
        rows = [0 if batch is None else len(batch.positions) for batch in batches]
        if not any(rows):
            return
        to_each = [rows[self._team.crew] * len(columns) * self._num_bins for columns in self._columns]
        from_each = [number * self._own[0] * self._num_bins for number in rows]
        sent, received = self._sent[: sum(to_each)], self._received[: sum(from_each)]
        if assignments is not None and self._kept.error is None:
            self._kept(own_work()(lambda: self._fill(sent.split(to_each), assignments.to(sent.device))))
        self._team.peers.exchange(received, sent, from_each, to_each)
        for batch, part in zip(batches, received.split(from_each), strict=True):
            if batch is not None:
                self._add(batch, part.view(len(batch.positions), *self._own))

    def sums(self) -> Sums | None:
        """The sums of this rank's columns, after the last round; None if it has no column."""
        return None if self._accumulator is None else self._accumulator.sums()

    def _add(self, batch: Batch, assignments: Tensor) -> None:
        accumulator = self._accumulator
        if accumulator is not None and self._kept.error is None:
            self._kept(own_work()(lambda: accumulator.add(batch, assignments.to(self._device))))

    def _fill(self, parts: Sequence[Tensor], assignments: Tensor) -> None:
        for part, columns in zip(parts, self._columns, strict=True):
            out = part.view(len(assignments), len(columns), self._num_bins)
            torch.index_select(assignments, 1, columns, out=out)
