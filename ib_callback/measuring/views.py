"""Views of a measurement: the same quantities for a part of the layers, or for another variant of the assignments.

A pass adds up columns: one for each layer with the first draw of reference points, then with the next draw, …; then for
each draw again, with the mean unit state of each layer removed (model/capture.py). A view is a measurement made from
the sums of some of these columns, as if there were no others. Its ratios are ratios of means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Views:
    """The columns of one pass, and the views that are read from them.

    num_layers: number of measured layers L.
    draws: number of draws of reference points.
    center: whether each draw is also measured with mean unit states removed.
    last_block: whether each variant has one more column, the last block before the final norm.
    """

    num_layers: int
    draws: int = 1
    center: bool = False
    last_block: bool = False

    @property
    def num_columns(self) -> int:
        """Number of columns of one variant."""
        return self.num_layers + self.last_block

    @property
    def num_variants(self) -> int:
        """Number of variants of the assignments."""
        return self.draws * (2 if self.center else 1)

    @property
    def layers(self) -> dict[str, list[int]]:
        """Parts of the layers by name: the last quarter, the last layer, and both before the final norm."""
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
        """{name of the view: its columns for each draw}; without the plain numbers.

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
