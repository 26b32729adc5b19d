"""The label sets of orders, and that their nulls are one."""

import torch
from tiny_models import make_probe

from ib_callback.measuring.planner import make_plan


def test_sides_are_numbered_from_the_narrowest_order_on():
    plan = make_plan(make_probe(), {"bigram": 2, "token": 1}, (), batch_size=4, null=True, seed=0)
    orders, nulls = plan.quantities
    assert orders.sets == {"token": (0, 2), "bigram": (1, 3)}
    for name, (before, after) in orders.sets.items():
        assert plan.label_sets[before].name == ("complexity", name)
        assert plan.label_sets[after].name == ("expressivity", name)
        assert nulls.sets[name] == {"complexity_null": before, "expressivity_null": after}
    assert plan.nulls == (nulls.null,)
    assert plan.single


def test_no_null_and_features_alone():
    probe = make_probe(labels={"half": torch.arange(10)[:, None].expand(10, 16) % 2})
    bare = make_plan(probe, {"token": 1}, (), batch_size=4, null=False, seed=0)
    assert [type(quantity).__name__ for quantity in bare.quantities] == ["Orders"]
    assert bare.nulls == ()
    alone = make_plan(probe, {"token": 1}, ("half",), batch_size=4, null=True, seed=0, planes=False)
    assert [type(quantity).__name__ for quantity in alone.quantities] == ["Feature"]
    assert not alone.single
