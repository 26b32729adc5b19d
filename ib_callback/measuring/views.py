"""Views of a measurement: other layers than all of them, and other variants of the assignments than the first.

A pass sums columns: those of all layers for the first draw of reference points, for the next draw, …, then for each
draw again with the mean unit state of each layer removed (model/capture.py). A view is what the sums of some of these
columns amount to, as if they were all there is: ratios are ratios of means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    """What is read from one pass.

    num_layers: L, that are measured.
    draws: of reference points.
    center: whether each draw is there with mean unit states removed, too.
    last_block: whether each variant has one more column, the last block before the final norm.
    """

    num_layers: int
    draws: int = 1
    center: bool = False
    last_block: bool = False

    @property
    def num_columns(self) -> int:
        """Of one variant."""
        return self.num_layers + self.last_block

    @property
    def num_variants(self) -> int:
        """Of the assignments."""
        return self.draws * (2 if self.center else 1)

    @property
    def layers(self) -> dict[str, list[int]]:
        """Parts of the layers by name: the last quarter, the last one, and both before the final norm."""
        every = list(range(self.num_columns))
        number = max(1, math.ceil(self.num_layers / 4))
        measured = every[: self.num_layers]
        parts = {"late": measured[-number:], "last": measured[-1:]}
        if self.last_block:
            before = [*measured[:-1], every[-1]]
            parts |= {"late_blocks": before[-number:], "last_block": before[-1:]}
        return parts

    @property
    def others(self) -> dict[str, list[list[int]]]:
        """By name of the view, its columns for each draw; all but the plain numbers.

        >>> Views(5).others
        {'late': [[3, 4]], 'last': [[4]]}
        >>> list(Views(5, draws=2, center=True).others)
        ['late', 'last', 'averaged', 'averaged/late', 'averaged/last', 'centred', 'centred/late', 'centred/last']
        >>> Views(5, draws=2, center=True).others["centred/last"]
        [[14], [19]]
        """
        found = {name: [layers] for name, layers in self.layers.items()}
        variants = {"averaged": range(self.draws)} if self.draws > 1 else {}
        variants |= {"centred": range(self.draws, 2 * self.draws)} if self.center else {}
        for variant, numbers in variants.items():
            whole = list(range(self.num_layers))
            for name, layers in {variant: whole, **{f"{variant}/{k}": v for k, v in self.layers.items()}}.items():
                found[name] = [[number * self.num_columns + layer for layer in layers] for number in numbers]
        return found
