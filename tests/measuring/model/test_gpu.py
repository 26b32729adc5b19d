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
from ib_callback.estimator.quantise import assign, in_parts, reference_points
from ib_callback.estimator.rows import assign_rows
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


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *((name, torch.bfloat16) for name in OPTIONS),
        ("default", torch.float32),
        ("default", torch.float16),
        ("centred", torch.float16),
    ],
    ids=str,
)
def test_its_numbers_are_those_of_the_cpu(options, dtype, as_on_a_gpu):
    """Of a model in bfloat16 they differ by 2e-7 at most, in float16 by 5e-8, in float32 by nothing."""
    model, probe = llama().to(dtype).eval(), make_probe()
    expected = numbers(ib.measure(model, probe, **OPTIONS[options]))
    as_on_a_gpu()
    found = numbers(ib.measure(model, probe, **OPTIONS[options]))
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


@pytest.fixture
def checked_late(as_on_a_gpu, monkeypatch):
    """As on a GPU, which is not waited for before the last batch."""
    as_on_a_gpu()
    monkeypatch.setattr(Capture, "CHECKED_AT_ONCE", frozenset())


def test_of_all_passes_and_layers_states_that_cannot_be_quantised_are_told_once(checked_late):
    """Those at positions that are not wanted do not matter."""
    first, second = nn.Identity(), nn.Identity()
    good, bad = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    bad[0, 0], bad[1, 2] = float("nan"), 0.0
    layers = [Layer("first", first), Layer("second", second)]
    with Capture(layers, Quantiser(7, "calibrated", 0)) as capture:
        for states, positions in ((good, [0, 5]), (bad, [1, 2, 3]), (bad, [1, 5]), (bad, [0, 5]), (good, [0, 5])):
            table = capture.run(lambda states=states: second(first(good) + states), torch.tensor(positions), (2, 3))
            assert bool(table[:, 0].isfinite().all())
        with pytest.raises(RepresentationError, match=r"11 valid positions of this pass: 'second' \(1\)\."):
            capture.check_usable()
        capture.check_usable()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("options", [{}, {"center": True, "loss": False, "readout": False}], ids=["pass", "moments"])
def test_a_measurement_of_states_that_cannot_be_quantised_fails(number, options, checked_late):
    model = llama().eval()
    meter = ib.Meter(make_probe(), batch_size=2, layers=["model.layers.*"], prediction=False, **options)
    meter.measure(model)
    calls = iter(range(99))
    model.model.layers[1].register_forward_hook(lambda module, args, out: out * (number if next(calls) == 2 else 1.0))
    with pytest.raises(RepresentationError, match=r"positions of this pass: 'model.layers.1' \(\d+\)\."):
        meter.measure(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1e-4, 1e-4), (1e-3, 1e3), (300.0, 6e4)], ids=str)
def test_unit_states_of_all_sizes_add_up(sizes, dtype):
    states = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    states = (states / states.abs().amax(1, keepdim=True) * torch.linspace(*sizes, 40)[:, None]).to(dtype)
    rows = states.T.contiguous().T  # neighbours in a row lie apart
    parts, scale = in_parts(reference_points(24, 7), dtype)
    out = torch.empty(30, 7)
    positions = torch.arange(39, 9, -1)
    norms, units = assign_rows(rows, positions, parts, 0.1 * scale, out, sum_units=True)
    exact = states.double()[positions]
    lengths = exact.norm(dim=1)
    torch.testing.assert_close(norms.double(), lengths, rtol=1e-6, atol=0)
    torch.testing.assert_close(units.double().sum(0), (exact / lengths[:, None]).sum(0), rtol=0, atol=2e-5)
    torch.testing.assert_close(out.double(), assign(exact, reference_points(24, 7).double(), 0.1)[0], rtol=0, atol=2e-5)


def test_distributions_that_are_not_finite_are_told_in_whichever_batch(checked_late):
    model = llama().eval()
    meter = ib.Meter(make_probe(), batch_size=2, loss=False, prediction=True, readout=False, layers=["model.layers.*"])
    assert "prediction" in meter.measure(model).views
    calls = iter(range(99))
    model.lm_head.register_forward_hook(lambda module, args, out: out * (float("nan") if next(calls) == 0 else 1.0))
    with pytest.warns(RuntimeWarning, match="the prediction of the model could not be measured: logits are not finite"):
        assert "prediction" not in meter.measure(model).views


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
            in_place = op is torch.ops.aten.copy_.default
            source = args[1] if in_place else args[0]
            is_free = args[2:3] == (True,) if in_place else (kwargs or {}).get("non_blocking", False)
            self.uploads += source.device.type == "cpu"
            self.waits += source.device.type == "cuda" or not is_free
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


def one_pass(counter, monkeypatch, num_layers, dtype=torch.bfloat16, **options):
    """Counts of a batch in the middle of a pass of `Meter`, beside those of the model's forward."""
    model = llama(num_hidden_layers=num_layers, max_position_embeddings=512, vocab_size=300).to(dtype).eval()
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
        centers = [torch.empty(16) for _ in layers] if meter.center else None
        sums, _ = meter._pass(model, plan, layers, team, centers, meter._accompanied(len(layers)), losses, aimed)
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


NOTHING_ELSE = {"loss": False, "readout": False}


@pytest.mark.parametrize(
    ("num_layers", "has_triton", "options", "most", "uploads"),
    [
        (32, False, NOTHING_ELSE, 800, 2),
        (32, True, {}, 150, 5),
        (2, True, NOTHING_ELSE | {"standard_errors": 3}, 150, 2),
        (2, True, NOTHING_ELSE | {"center": True, "draws": 2}, 90, 2),
        (2, False, {"companions": ("rankme",), "companion_layers": "all"}, 240, 5),
    ],
    ids=["torch", "triton", "errors", "centred", "companions"],
)
def test_a_batch_on_a_gpu(num_layers, has_triton, options, most, uploads, fake_gpu, monkeypatch):
    """8 x 512 tokens: beside the forward so many launches and copies to it, and no waiting."""
    monkeypatch.setattr(fused, "available", lambda device: has_triton and device.type == "cuda")
    launches, what, on_host, copies, waits = one_pass(fake_gpu, monkeypatch, num_layers, **options)
    assert num_layers < launches <= most
    assert copies <= uploads
    assert waits == 0
    assert on_host == []
    variants = 4 if "center" in options else 1
    assert what["ib_callback.quantise.default"] == (num_layers * variants if has_triton else 0)
