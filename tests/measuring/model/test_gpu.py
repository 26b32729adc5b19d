"""What is done on a GPU, seen without one: its numbers on the CPU, its launches on tensors that hold nothing."""

import collections
import ctypes
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import llama, make_probe, numbers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ib_callback as ib
from ib_callback.common import transfer
from ib_callback.common.errors import RepresentationError
from ib_callback.estimator import fused
from ib_callback.estimator.quantise import in_parts, reference_points
from ib_callback.measuring import meter as meter_module
from ib_callback.measuring.model import codebook
from ib_callback.measuring.model.access import resolve_layers
from ib_callback.measuring.model.capture import Capture, Layer, Quantiser
from ib_callback.measuring.model.loss import Route
from ib_callback.measuring.team import Team

# --- its numbers


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """From when it is called, states are quantised as on a GPU without Triton."""
    return lambda: monkeypatch.setattr(Quantiser, "takes_rows", lambda self, rows: rows.dtype != torch.float64)


OPTIONS = {
    "default": {},
    "draws": {"draws": 2, "readout": False},
    "centred": {"center": True, "last_block": True},
    "errors": {"standard_errors": 3, "loss": "all"},
    "companions": {"companions": ("rankme",), "companion_layers": "all", "baseline": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_its_numbers_are_those_of_the_cpu(options, dtype, as_on_a_gpu):
    """Of a model in bfloat16 they differ by 2e-7 at most, in float16 by 5e-8, in float32 by nothing."""
    model, probe = llama().to(dtype).eval(), make_probe()
    expected = numbers(ib.measure(model, probe, **options))
    as_on_a_gpu()
    found = numbers(ib.measure(model, probe, **options))
    for name, value, wanted in leaves(found, expected):
        assert value == pytest.approx(wanted, rel=1e-6, abs=1e-6), name


def leaves(found, expected, name=""):
    """Name and values of all floats; all else must be the same."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return [leaf for key in expected for leaf in leaves(found[key], expected[key], f"{name}/{key}")]
    if isinstance(expected, (list, tuple)):
        pairs = zip(found, expected, strict=True)
        return [leaf for number, pair in enumerate(pairs) for leaf in leaves(*pair, f"{name}/{number}")]
    if isinstance(expected, float):
        return [(name, found, expected)]
    assert found == expected, name
    return []


@pytest.mark.parametrize(
    ("dtype", "parts", "error"), [(torch.bfloat16, 2, 2.0**-17), (torch.float16, 2, 2.0**-21), (torch.float32, 1, 0.0)]
)
def test_the_parts_of_points_add_up_to_them(dtype, parts, error):
    points = reference_points(300, 50)
    found, scale = in_parts(points, dtype)
    assert (found.dtype, found.shape) == (dtype, (parts, 50, 300))
    apart = (found.double().sum(0) / scale - points.double()).abs()
    assert bool((apart <= error * points.double().abs().clamp_min(1e-3)).all())


def test_states_that_cannot_be_quantised_are_told_of_after_the_last_batch(as_on_a_gpu, monkeypatch):
    """Those at positions that are not wanted do not matter."""
    as_on_a_gpu()
    layer = nn.Identity()
    states = torch.randn(2, 3, 6)
    states[0, 0], states[1, 2] = float("nan"), 0.0
    with Capture([Layer("only", layer)], Quantiser(7, "calibrated", 0)) as capture:
        assignments = capture.run(lambda: layer(states), torch.tensor([1, 2, 3]), (2, 3))
        assert bool(assignments.isfinite().all())
        check = Capture.check_usable
        monkeypatch.setattr(Capture, "check_usable", lambda self: None)  # which does nothing amid passes on a GPU
        for positions in ([1, 5], [0, 5], [1, 2]):
            capture.run(lambda: layer(states), torch.tensor(positions), (2, 3))
        with pytest.raises(RepresentationError, match=r"6 valid positions .*: 'only' \(3\)\."):
            check(capture)
        check(capture)  # told once


# --- its launches


@pytest.fixture
def fake_gpu(monkeypatch):
    """Within the mode, tensors on cuda:0 that hold nothing. What a measurement reads of them is ones or zeros."""
    _give_a_device_guard()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(codebook, "free_memory", lambda device: 80 << 30)
    monkeypatch.setattr(codebook, "_plain_weight", lambda module: module.weight)  # whose class is another one
    counter = Counter()
    original, to_numpy = transfer.read, torch.Tensor.numpy

    def numpy(tensor):  # of tensors that are there, on the host
        with unset_fake_temporarily():
            return to_numpy(tensor)

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)

    def read(tensors):
        counter.waits += any(tensor.device.type == "cuda" for tensor in tensors)
        with unset_fake_temporarily():  # everything is finite, nothing is bad
            return [torch.full(tuple(t.shape), t.dtype == torch.bool, dtype=t.dtype) for t in tensors]

    for module in [each for each in sys.modules.values() if getattr(each, "read", None) is original]:
        monkeypatch.setattr(module, "read", read)
    return counter


def _give_a_device_guard():
    """Torch refuses to copy to a kind of device that it was built without; as one built with it does in fake mode."""
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libc10.*"))))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    guards[cuda] = guards[cuda] or guards[meta]


class Counter(TorchDispatchMode):
    """Counts what a GPU is given to do, copies to it, what waits for it, and what is computed on the host by torch.

    What asks for a number of it, or depends on one, fails by itself in fake mode.
    """

    def __init__(self):
        super().__init__()
        self.batches = []
        self._begin()

    def _begin(self):
        self.launches, self.on_host, self.uploads, self.waits = collections.Counter(), [], 0, 0

    def next_batch(self):
        self.batches.append((self.launches, self.on_host, self.uploads, self.waits))
        self._begin()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        before, after = (devices(things) for things in ((args, kwargs or {}), out))
        name = str(op)
        if name.startswith("prim.") or "empty" in name or "detach" in name or "_unsafe_view" in name or is_view(op):
            return out
        if "cuda" not in before | after:
            self.on_host.append(name)
            return out
        if op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and "cpu" in before | after:
            source = args[-1] if op is torch.ops.aten.copy_.default else args[0]
            self.uploads += source.device.type == "cpu"
            self.waits += source.device.type == "cuda"
        else:
            self.launches[name] += 1
        return out


def devices(things):
    return {leaf.device.type for leaf in _pytree.tree_leaves(things) if isinstance(leaf, torch.Tensor)}


def is_view(op):
    return any(each.alias_info is not None and not each.alias_info.is_write for each in op._schema.returns)


@contextmanager
def on_fake_gpu(model, mode):
    """Its parameters and buffers are on the GPU."""
    known = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in [each for each in table.items() if each[1] is not None]:
                with mode:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                kept = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
                table[name] = known.setdefault(id(tensor), kept)
    with mode, torch.no_grad():
        yield


LAYERS = 32


def one_pass(counter, monkeypatch, dtype=torch.bfloat16, **options):
    """Counts of a batch in the middle of a pass of `Meter`, beside those of the model's forward."""
    model = llama(num_hidden_layers=LAYERS, max_position_embeddings=512, vocab_size=300).to(dtype).eval()
    ids = torch.randint(0, 300, (24, 512), generator=torch.Generator().manual_seed(0))
    probe = ib.Probe.from_tokens(ids)
    meter = ib.Meter(probe, layers=["model.layers.*"], **options)
    plan, team = meter.plan(), Team.alone()
    if meter.prediction:
        meter._predicted_plan()
    losses = meter._loss_pass(model, Route("head") if meter.loss or meter.prediction else None)
    tokens = codebook.frequent_tokens(probe, 100)
    monkeypatch.setattr(meter_module, "frequent_tokens", lambda probe, number: tokens)
    bar = meter._bar

    def rounds(*args):
        for number, round_ in enumerate(bar(*args)):
            if number:
                counter.next_batch()
            yield round_
        counter.next_batch()

    monkeypatch.setattr(meter, "_bar", rounds)
    with on_fake_gpu(model, FakeTensorMode(allow_non_fake_inputs=True)), counter:
        batch = torch.zeros(8, 512, dtype=torch.long, device="cuda:0")
        model(batch, attention_mask=torch.ones_like(batch), use_cache=False, logits_to_keep=1)
        counter.next_batch()
        layers = resolve_layers(model, meter.layers)
        aimed = meter._aimed(model, plan, team, losses, len(layers))
        sums, _ = meter._pass(model, plan, layers, team, None, [], losses, aimed)
        in_the_pass = len(counter.batches)
        for each in aimed.values():
            each.outcome()
            assert each.why == ""
        counter.next_batch()
    assert in_the_pass == 4
    assert sums.conditional.device.type == "cpu"
    assert losses is None or losses.failed is None
    forward, _, middle, *_ = counter.batches
    launches, *others = middle
    return launches.total() - forward[0].total(), launches, *others


@pytest.mark.parametrize(
    ("has_triton", "options", "most", "uploads"),
    [
        (False, {"loss": False, "readout": False}, 700, 2),
        (True, {"loss": False}, 110, 3),
        (True, {}, 150, 5),
    ],
    ids=["torch", "triton, loss=False", "triton, default"],
)
def test_a_batch_on_a_gpu(has_triton, options, most, uploads, fake_gpu, monkeypatch):
    """8 x 512 tokens, 32 layers: beside the forward so many launches and copies to it, and no waiting."""
    monkeypatch.setattr(fused, "available", lambda device: has_triton and device.type == "cuda")
    launches, what, on_host, copies, waits = one_pass(fake_gpu, monkeypatch, **options)
    assert LAYERS < launches <= most
    assert copies <= uploads
    assert waits == 0
    assert on_host == []
    assert what["ib_callback.quantise.default"] == (LAYERS if has_triton else 0)
