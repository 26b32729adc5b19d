"""Parameters that a model changes outside training: noticed, named, and put back where that can be done."""

import pytest
import torch
from tiny_models import fsdp2, llama, make_probe, numbers
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import ib_callback as ib
from ib_callback.measuring.model import parameters
from ib_callback.measuring.model.parameters import unchanged_parameters


class Mischievous(nn.Linear):
    """Harms its weight behind each forward outside training."""

    harm = None

    def forward(self, x):
        output = super().forward(x)
        if self.harm is not None and not self.training:
            self.harm(self)
        return output


class Model(nn.Module):
    def __init__(self, harm=None, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 5)
        self.stack = nn.Sequential(nn.Linear(5, 7), nn.Sequential(Mischievous(7, 5)))
        self.tied = Mischievous(7, 5)
        self.tied.weight = self.stack[1][0].weight
        self.odd = nn.Parameter(torch.tensor([float("nan"), 1.0, 2.0]))
        self.numbers = nn.Parameter(torch.arange(3, dtype=torch.int8), requires_grad=False)
        self.complex = nn.Parameter(torch.tensor([1 + 2j]))
        self.empty = nn.Parameter(torch.empty(0))
        self.to(dtype)
        self.stack[1][0].harm = harm
        self.calls = 0

    def forward(self, ids, mask):
        self.calls += 1
        return self.stack(self.embed(ids))


def meter(**keywords):
    return ib.Meter(make_probe(), layers=["stack.0"], forward=lambda model, ids, mask: model(ids, mask), **keywords)


def in_place(layer):
    layer.weight.mul_(2)


def through_data(layer):
    layer.weight.data[0, 0] = torch.nextafter(layer.weight.data[0, 0], torch.tensor(9.0).to(layer.weight))


def rows_that_change_places(layer):
    layer.weight.data.copy_(layer.weight.data.roll(1, 0))


def other_memory(layer):
    layer.weight.data = layer.weight.data * 2


def other_shape(layer):
    layer.weight.data = layer.weight.data[:, :3].half()


def transposed(layer):
    layer.weight.data = layer.weight.data.flatten().view(7, 5).T


def another_parameter(layer):
    layer.weight = nn.Parameter(layer.weight * 2)


def no_parameter(layer):
    del layer.weight
    layer.weight = torch.zeros(1)


def both_ways(layer):
    layer.weight.data.mul_(2)
    layer.weight = nn.Parameter(layer.weight.data.clone())


OVERWRITES = (in_place, through_data, rows_that_change_places, both_ways)
HARMS = (*OVERWRITES, other_memory, other_shape, transposed, another_parameter, no_parameter)


def state_of(model):
    return [
        (name, id(p), p.data_ptr(), p.stride(), p.dtype, p.requires_grad, p.detach().clone().view(-1).view(torch.uint8))
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.numel()
    ]


def is_same(a, b):
    return len(a) == len(b) and all(x[:-1] == y[:-1] and torch.equal(x[-1], y[-1]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_preflight_refuses_the_model_and_puts_its_parameters_back(harm, dtype):
    model = Model(harm, dtype).train()
    before = state_of(model)
    with pytest.raises(ib.ModelError, match=r"'stack\.1\.0\.weight' .*put back bit for bit.*forward="):
        meter().preflight(model)
    assert is_same(state_of(model), before)
    assert "weight" not in vars(model.stack[1][0])


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_measurement_that_changes_parameters_is_an_error_and_not_repeated(harm):
    model, measuring = Model(), meter()
    before = state_of(model)
    measuring.preflight(model)
    measuring.measure(model)
    assert is_same(state_of(model), before)
    model.stack[1][0].harm = harm
    what = "no longer has the weights.*go on from the last checkpoint" if harm in OVERWRITES else "put back bit for bit"
    with pytest.raises(ib.ModelError, match=rf"'stack\.1\.0\.weight' .*{what}"):
        measuring.measure(model)
    assert is_same(state_of(model), before) is (harm not in OVERWRITES)
    calls = model.calls
    with pytest.raises(ib.ModelError, match=r"so it is not measured again: .*'stack\.1\.0\.weight'"):
        measuring.measure(model)
    assert model.calls == calls
    measuring.measure(Model())


def test_without_room_for_copies_a_preflight_says_that_the_weights_are_lost(monkeypatch):
    monkeypatch.setattr(parameters, "free_memory", lambda device: 1)
    with pytest.raises(ib.ModelError, match=r"'stack\.1\.0\.weight' .*no longer has the weights.*load it again"):
        meter().preflight(Model(in_place))
    meter().preflight(Model())


@pytest.mark.parametrize(
    "harm",
    [
        lambda layer: layer.weight.mul_(1),
        lambda layer: setattr(layer.weight, "data", layer.weight.data.clone()),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
    ],
    ids=["written", "elsewhere", "another"],
)
def test_the_same_values_are_no_change_but_memory_and_object_are_put_back(harm):
    model, measuring = Model(harm), meter()
    before = state_of(model)
    measuring.preflight(model)
    measuring.measure(model)
    assert is_same(state_of(model), before)


def test_parameters_are_copied_before_the_model_leaves_training_mode():
    class Merging(Model):
        @property
        def training(self):
            return self.__dict__["on"]

        @training.setter
        def training(self, on):
            if self.__dict__.get("on") and not on:
                in_place(self.stack[1][0])
            self.__dict__["on"] = on

    with torch.no_grad():
        model = Merging()
        before = state_of(model)
        with pytest.raises(ib.ModelError, match=r"'stack\.1\.0\.weight' .*put back bit for bit"):
            meter().preflight(model)
    assert is_same(state_of(model), before)
    assert model.training


def test_an_error_of_the_body_does_not_hide_a_change():
    model = Model()

    def fail(body):
        with unchanged_parameters(model):
            body()
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        fail(list)
    with pytest.raises(ib.ModelError, match=r"'embed\.weight'") as raised:
        fail(model.embed.weight.data.zero_)
    assert isinstance(raised.value.__context__, KeyError)


def test_parameters_that_are_made_of_tensors():
    """As quantised ones are."""
    model = nn.Module()
    model.weight = nn.Parameter(TwoTensor(torch.ones(3), torch.zeros(3)))
    inner = model.weight.b
    with unchanged_parameters(model):
        pass
    with pytest.raises(ib.ModelError, match=r"'weight'.*put back"), unchanged_parameters(model, copied=True):
        model.weight.b.add_(1)
    with pytest.raises(ib.ModelError, match=r"'weight'.*put back"), unchanged_parameters(model):
        model.weight.b = torch.ones(3)
    assert model.weight.b is inner
    assert inner.tolist() == [0.0] * 3


def test_sharded_parameters(alone):
    model = fsdp2(llama())
    shard = model.model.norm.weight.to_local()
    before = shard.clone()
    measuring = ib.Meter(make_probe())
    measuring.preflight(model)
    assert numbers(measuring.measure(model)) == numbers(ib.measure(llama(), make_probe()))

    def harm(*_):
        shard.mul_(2)

    model.model.norm.register_forward_hook(harm)
    with pytest.raises(ib.ModelError, match=r"FSDPLlamaForCausalLM changed its own parameters 'model\.norm\.weight'"):
        measuring.preflight(model)
    assert torch.equal(shard, before)


def test_parameters_of_deepspeed_come_and_go_and_their_shards_stay():
    model = nn.Linear(2, 2, bias=False)
    model.weight.ds_id, model.weight.ds_tensor = 0, torch.ones(2)
    whole, model.weight.data = model.weight.data, torch.empty(0)
    with unchanged_parameters(model):
        model.weight.data = whole
    assert model.weight.data_ptr() == whole.data_ptr()
    with pytest.raises(ib.ModelError, match=r"'weight'.*no longer has the weights"), unchanged_parameters(model):
        model.weight.ds_tensor[0] = 2


class Packing(nn.Module):
    """Replaces a part of itself outside training."""

    def __init__(self):
        super().__init__()
        self.embed, self.stack = nn.Embedding(40, 5), nn.ModuleList([nn.Linear(5, 5)])
        self.packs = False

    def forward(self, ids, mask):
        states = self.stack[0](self.embed(ids))
        if self.packs and not self.training:
            self.embed = nn.Embedding(40, 5)
        return states


def test_parts_that_are_replaced_are_put_back():
    model = Packing()
    part, before = model.embed, state_of(model)
    measuring = meter()
    measuring.measure(model)
    model.packs = True
    for look in (measuring.preflight, measuring.measure):
        with pytest.raises(ib.ModelError, match=r"'embed\.weight' .*put back bit for bit"):
            look(model)
        assert model.embed is part
        assert is_same(state_of(model), before)
        assert list(model._modules) == ["embed", "stack"]


@pytest.mark.parametrize("make", [lambda: nn.Parameter(torch.ones(1)), lambda: nn.Linear(5, 5)])
def test_what_a_pass_adds_is_no_change_and_taken_off_again(make):
    class Lazy(Packing):
        def __init__(self):
            super().__init__()
            self.added = None

        def forward(self, ids, mask):
            if self.added is None:
                self.added = make()
            return super().forward(ids, mask)

    model = Lazy()
    before = state_of(model)
    meter().preflight(model)
    meter().measure(model)
    assert model.added is None
    assert is_same(state_of(model), before)
    model(torch.ones(1, 3, dtype=torch.long), None)
    assert model.added is not None


def test_whether_parameters_are_trained_and_their_gradients_are_put_back():
    def freeze(layer):
        layer.weight.requires_grad_(False)
        layer.weight.grad = None

    model = Model(freeze)
    weight = model.tied.weight
    gradient = weight.grad = torch.ones(5, 7)
    meter().measure(model)
    assert weight.requires_grad
    assert weight.grad is gradient


STORED = {
    "every other value": lambda: torch.randn(64)[::2],
    "part of a larger tensor": lambda: torch.randn(65)[1:],
    "column": lambda: torch.randn(64, 3)[:, 1:2],
    "expanded": lambda: torch.ones(1, 4).expand(4, 4),
    "no dimension": lambda: torch.randn(3)[1],
    "conjugate": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "8 bits": lambda: torch.randn(4, 8).to(torch.float8_e4m3fn),
    "4 bits": lambda: torch.zeros(4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "truth": lambda: torch.randn(5) > 0,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore:.*(deprecated|prototype)")
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("copied", [True, False])
def test_no_false_alarm_however_a_parameter_is_stored(stored, copied):
    model = nn.Module()
    model.weight = nn.Parameter(STORED[stored](), requires_grad=False)
    with unchanged_parameters(model, copied=copied):
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [slice(None), slice(3, None, 4), slice(3, 16, 12)], ids=["all", "fourth", "two"])
def test_signs_that_change_are_noticed_without_copies(dtype, chosen):
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype))
    with pytest.raises(ib.ModelError, match="'weight'"), unchanged_parameters(model):
        model.weight.data[chosen].neg_()


def test_parts_made_by_torchscript():
    model = Packing()
    plain = meter().measure(model)
    model.stack[0] = nn.Sequential(torch.jit.script(model.stack[0]))
    measuring = meter()
    measuring.preflight(model)
    assert measuring.measure(model).entropy == plain.entropy
