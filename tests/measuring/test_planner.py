"""What a probe must have to be measured on."""

import pytest
import torch

import ib_callback as ib
from ib_callback.measuring.planner import make_plan


def test_no_valid_position():
    probe = ib.Probe.from_tokens(torch.ones(3, 7, dtype=torch.long))
    with pytest.raises(
        ib.ProbeError, match=r"no valid position.*at least 8 real tokens.*got at most 7.*narrower orders"
    ):
        make_plan(probe, {"quadgram": 4}, (), batch_size=2, null=True, seed=0)
