"""Who does what of a measurement that several ranks share.

Sums are separate by layer. So each of R ranks runs every R-th batch of the plan, one exchange a round sends each rank
the assignments of its own layers in all R batches, and it accumulates them in the order of the plan, like one alone.

Ranks that make a forward together, as those of a tensor-parallel group do, are a *crew*: they run the same batch, all
of them hold its states, and so each takes layers of its own without being sent any. Crews run different batches. Where
every rank is a crew of its own, which is mostly so, the exchange is among all of them.
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
# What each crew does at the same time; None where nothing is left for it.
Round = Sequence[Thing | None]


class Team:
    """The ranks that share a measurement.

    Args:
        ranks: all of them.
        crews: numbers among them of those that make each forward together, of all crews; all of one size.
        in_step: whether forwards of different crews wait for each other, as those of sharded models do.

    Attributes:
        num_crews: D, that run batches at the same time.
        crew: number of the own one.
        peers: the ranks that have the same place in their crews, in the order of the crews.
        together: the ranks of the own crew.
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
        """This process alone."""
        return cls(Ranks.alone())

    @property
    def is_alone(self) -> bool:
        """Whether nobody shares."""
        return self.ranks.size == 1

    def rounds(self, things: Sequence[Thing]) -> Iterator[Round[Thing]]:
        """What all crews do at the same time, in the order of the things.

        >>> list(Team.alone().rounds("ab"))
        [('a',), ('b',)]
        """
        for begin in range(0, len(things), self.num_crews):
            some = things[begin : begin + self.num_crews]
            yield (*some, *[None] * (self.num_crews - len(some)))

    def shares(self, number: int) -> list[range]:
        """Which of so many layers each rank accumulates, by its number among the ranks: neighbours, evenly."""
        size = self.ranks.size
        bounds = [rank * number // size for rank in range(size + 1)]
        shares = [range(*pair) for pair in pairwise(bounds)]
        # Those of the peers that exchange layers are side by side.
        order = [crew[place] for place in range(self._size) for crew in self._crews]
        return [shares[order.index(rank)] for rank in range(size)]

    def by_layer(self, number: int) -> list[int]:
        """The ranks in the order of their layers."""
        shares = self.shares(number)
        return sorted(range(self.ranks.size), key=lambda rank: (shares[rank].start, shares[rank].stop, rank))

    def beside(self, number: int) -> list[list[int]]:
        """By rank, which columns of one it accumulates: that one on a rank that has the fewest of so many layers."""
        shares = self.shares(number)
        least_busy = min(range(self.ranks.size), key=lambda rank: (len(shares[rank]), -rank))
        return [[0] if rank == least_busy else [] for rank in range(self.ranks.size)]

    def of_peers(self, by_rank: Sequence[Thing]) -> list[Thing]:
        """What belongs to the peers, in their order, of what is given for all ranks."""
        return [by_rank[crew[self._place]] for crew in self._crews]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the model's own forward: where the others wait in it, a failure cannot be survived."""
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
    """The crews, as numbers among the ranks; all ranks in one where they are not of one size.

    Args:
        together: for each rank, the numbers among all processes of those that make its forwards with it, if any.
        members: the number of each rank among all processes.

    Raises:
        ValueError: some that make a forward together are not among the ranks.

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
    """An Accumulator of the columns that are this rank's own, fed with the assignments of all ranks.

    All memory that an exchange needs is had when it is made, for a rank that fails amid the rounds must still take part
    in them. What fails is kept, and nothing is accumulated any more.

    Args:
        plan: of the probe.
        columns: by rank, those that it accumulates, of all columns of the assignments.
        num_bins, weighting, device: as for `Accumulator`.
        team: the ranks.
        kept: for failures.
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
        """Add a round: on every rank, each with the assignments of its own batch.

        Args:
            batches: of the plan, by crew.
            assignments: [T_b, columns, num_bins] of the own crew's; None where there is none, or where it failed.
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
        """Of the own columns, after the last round; None if there are none."""
        return None if self._accumulator is None else self._accumulator.sums()

    def _add(self, batch: Batch, assignments: Tensor) -> None:
        accumulator = self._accumulator
        if accumulator is not None and self._kept.error is None:
            self._kept(own_work()(lambda: accumulator.add(batch, assignments.to(self._device))))

    def _fill(self, parts: Sequence[Tensor], assignments: Tensor) -> None:
        for part, columns in zip(parts, self._columns, strict=True):
            out = part.view(len(assignments), len(columns), self._num_bins)
            torch.index_select(assignments, 1, columns, out=out)
