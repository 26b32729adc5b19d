"""Hooks: where they are, when they fire, and that none is left behind."""

import pytest
import torch
from torch import nn

from ib_callback.common.errors import ModelError, RepresentationError
from ib_callback.estimator.quantise import reference_points, resolve_temperature, soft_assign
from ib_callback.measuring.model.access import Layer
from ib_callback.measuring.model.capture import Capture, Quantiser


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x))


def num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack()


def layers_of(stack):
    return [Layer("first", stack.first), Layer("second", stack.second)]


QUANTISER = Quantiser(num_bins=7, temperature="calibrated", seed=3)
POSITIONS = torch.tensor([1, 2, 5])


def test_assignments_are_those_of_the_layers_outputs(stack):
    x = torch.randn(2, 3, 6)
    with Capture(layers_of(stack), QUANTISER) as capture, torch.no_grad():
        assignments = capture.run(lambda: stack(x), POSITIONS, (2, 3))
    points, temperature = reference_points(6, 7, seed=3), resolve_temperature("calibrated", 6, 7)
    for index, states in enumerate((stack.first(x), stack(x))):
        expected = soft_assign(states.detach().reshape(6, 6)[POSITIONS], points, temperature)
        torch.testing.assert_close(assignments[:, index], expected, rtol=1e-5, atol=1e-7)


def test_hooks_are_there_inside_and_gone_after_also_when_the_body_raises(stack):
    assert num_hooks(stack) == 0
    with Capture(layers_of(stack), QUANTISER):
        assert num_hooks(stack) == 2
        with Capture(layers_of(stack)[:1], QUANTISER):
            assert num_hooks(stack) == 3
        assert num_hooks(stack) == 2
    assert num_hooks(stack) == 0
    with pytest.raises(KeyError, match="boom"), Capture(layers_of(stack), QUANTISER) as capture:
        capture.run(lambda: {}["boom"], POSITIONS, (2, 3))
    assert num_hooks(stack) == 0


def test_no_hook_is_left_when_one_cannot_be_registered(stack):
    class Refusing(nn.Module):
        def register_forward_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

    with pytest.raises(RuntimeError, match="no hooks here"):
        Capture([*layers_of(stack), Layer("refusing", Refusing())], QUANTISER).__enter__()
    assert num_hooks(stack) == 0


def test_outputs_of_the_model_are_not_replaced(stack):
    x = torch.randn(2, 3, 6)
    plain = stack(x)
    with Capture(layers_of(stack), QUANTISER) as capture:
        outputs = []
        capture.run(lambda: outputs.append(stack(x)), POSITIONS, (2, 3))
        other = stack(x)  # a pass that run did not make
    assert torch.equal(outputs[0], plain)
    assert torch.equal(other, plain)


def test_tuples_and_model_outputs_are_unpacked():
    class Tupled(nn.Module):
        def forward(self, x):
            return (x, "cache")

    module = Tupled()
    x = torch.randn(2, 3, 6)
    with Capture([Layer("tupled", module)], QUANTISER) as capture:
        assert capture.run(lambda: module(x), POSITIONS, (2, 3)).shape == (3, 1, 7)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_bad_vectors_name_layer_and_count_and_padding_may_hold_anything(stack, bad):
    nn.init.eye_(stack.first.weight)
    nn.init.zeros_(stack.first.bias)
    nn.init.constant_(stack.second.bias, 1.0)
    nn.init.zeros_(stack.second.weight)
    x = torch.ones(2, 3, 6)
    x[0, 0] = bad  # position 0 is not among those quantised
    with Capture(layers_of(stack)[:1], QUANTISER) as capture:
        capture.run(lambda: stack(x), POSITIONS, (2, 3))
        x[0, 1] = bad
        with pytest.raises(RepresentationError, match=r"3 valid positions in this batch: 'first' \(1\)\."):
            capture.run(lambda: stack(x), POSITIONS, (2, 3))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda stack, x: stack.first(x), "'second': expected it to run once in a forward pass, but it ran 0 times"),
        (lambda stack, x: stack(stack(x)), "'first': expected it to run once in a forward pass, but it ran 2 times"),
        (lambda stack, x: stack(x[0]), r"'first': expected an output of floats \[2, 3, dim\].*\(3, 6\)"),
    ],
)
def test_layers_that_cannot_be_measured(stack, forward, message):
    x = torch.ones(2, 3, 6)
    with Capture(layers_of(stack), QUANTISER) as capture, pytest.raises(ModelError, match=message):
        capture.run(lambda: forward(stack, x), POSITIONS, (2, 3))
