"""What a measurement needs, and what is done when memory runs out."""

import dataclasses
import warnings

import pytest
import torch

import ib_callback as ib
from ib_callback.common.checks import check_bytes
from ib_callback.measuring import team
from ib_callback.measuring.accumulate import Accumulator
from ib_callback.measuring.model.capture import Quantiser
from ib_callback.measuring.plan import memory
from ib_callback.measuring.plan.memory import SLACK, Means, Need, bytes_of, cheaper


@pytest.mark.parametrize(
    ("means", "layers", "of_measuring", "host", "expected"),
    [
        (Means(8), 32, True, 0, Means(8, 16)),
        (Means(8, 16), 16, True, 20, Means(8, 8)),
        (Means(8, 1), 1, True, 20, Means(8, 20, on_host=True)),  # one layer does not fit on the device
        (Means(8, 20, on_host=True), 20, True, 20, Means(8, 10, on_host=True)),
        (Means(8, 1), 1, True, 0, Means(4, 1)),
        (Means(1, 1), 1, True, 0, None),
        (Means(8), 32, False, 20, Means(4)),
        (Means(1), 32, False, 20, Means(1, 16)),  # what we hold may be what the forward lacks
        (Means(1, 1, on_host=True), 1, False, 20, None),
    ],
)
def test_what_is_tried_when_memory_ran_out(means, layers, of_measuring, host, expected):
    assert cheaper(means, layers, of_measuring=of_measuring, host_layers=host) == expected


def test_layers_within_a_budget():
    need = Need(each=100 << 20, beside=30 << 20, after=200 << 20)
    assert need.of(3) == 330 << 20
    assert need.of(1) == 200 << 20
    assert need.layers_within(1000 << 20, 32, probe="p") == 10  # what is beside is less than allocators' own
    assert dataclasses.replace(need, beside=SLACK + (150 << 20)).layers_within(1000 << 20, 32, probe="p") == 8
    assert need.layers_within(10**12, 32, probe="p") == 32
    # What is there while a batch is run is not while it is added up.
    of_moment = Need(each=100 << 20, beside=100 << 20, scratch=50 << 20, moment=220 << 20)
    assert [of_moment.of(number) for number in (1, 4, 5)] == [370 << 20, 520 << 20, 600 << 20]
    assert of_moment.layers_within(460 << 20, 32, probe="p") == 4  # moments are the forward's
    with pytest.raises(ib.ProbeError, match=r"memory_budget: for probe 'p', one layer needs [\d,]+ bytes.*got 1,000"):
        need.layers_within(1000, 32, probe="p")


@pytest.mark.parametrize(
    ("given", "expected"), [("8GiB", 8 << 30), ("500 MB", 500 * 10**6), ("1.5kib", 1536), ("12", 12), (7, 7)]
)
def test_bytes_as_text(given, expected):
    assert check_bytes("budget", given, cure="") == expected
    assert ib.Meter(make_probe(), memory_budget=given).memory_budget == expected


@pytest.mark.parametrize("given", ["much", "8 GiBs", "-1 GB", "0", "", "1e9"])
def test_text_that_is_no_number_of_bytes(given):
    with pytest.raises(ValueError, match='memory_budget: expected bytes, or text such as "8GiB" or "500 MB", got'):
        ib.Meter(make_probe(), memory_budget=given)


def test_bytes_of_counts_each_tensor_once():
    table = torch.zeros(10)
    assert bytes_of([{"a": [table, table], "b": (table.numpy(),)}, None, "text"]) == 80


# --- measurements in which memory runs out


class Model(torch.nn.Module):
    """Six layers of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(12, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))

    def forward(self, ids):
        states = self.embed(ids)
        for layer in self.layers:
            states = states + layer(states)
        return states


def make_probe():
    return ib.Probe.from_tokens(torch.randint(0, 12, (10, 24), generator=torch.Generator().manual_seed(0)))


def make_meter(**keywords):
    keywords = {"layers": ["layers.*"], "forward": lambda model, ids, mask: model(ids), "orders": "token"} | keywords
    return ib.Meter(make_probe(), loss=False, readout=False, **keywords)


def numbers(measurement):
    """All numbers of a measurement, in one list."""

    def flat(thing):
        if isinstance(thing, (dict, list)):
            for each in thing.values() if isinstance(thing, dict) else thing:
                yield from flat(each)
        elif isinstance(thing, float):
            yield thing

    return list(flat({k: v for k, v in measurement.to_dict().items() if k not in ("seconds", "settings")}))


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def fail(monkeypatch, kind, name, too_much):
    """Make a method run out of memory as long as `too_much` says so."""
    original = getattr(kind, name)

    def method(this, *given, **keywords):
        return out_of_memory() if too_much(this, *given) else original(this, *given, **keywords)

    monkeypatch.setattr(kind, name, method)


FAULTS = {
    "accumulator made": (Accumulator, "__init__", lambda this, plan, layers, *_: layers > 2),
    "batch added": (Accumulator, "add", lambda this, *_: this._at.shape[0] > 2),
    "sums read": (Accumulator, "sums", lambda this: this._at.shape[0] > 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_our_own_lack_of_memory_leads_to_fewer_layers_at_a_time(monkeypatch, fault):
    expected = numbers(make_meter().measure(Model()))
    fail(monkeypatch, *FAULTS[fault])
    meter = make_meter()
    with pytest.warns(RuntimeWarning, match=r"out of memory while measuring\. Trying again with batch_size=8") as told:
        assert numbers(meter.measure(Model())) == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True)
    assert ["3 layers at a time" in str(told[0].message), "1 layer at a time" in str(told[1].message)] == [True, True]
    assert meter.batch_size == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meter.measure(Model())  # what was found out is remembered


def test_a_hooks_lack_of_memory_leads_to_fewer_layers_at_a_time(monkeypatch):
    calls = []

    def too_much(*_):
        calls.append(1)
        return len(calls) == 2

    fail(monkeypatch, Quantiser, "__call__", too_much)
    meter = make_meter()
    with pytest.warns(RuntimeWarning, match=r"batch_size=8, 3 layers at a time\. This also holds"):
        meter.measure(Model())


def test_a_forwards_lack_of_memory_leads_to_smaller_batches_with_all_layers():
    sizes = []

    def forward(model, ids, mask):
        sizes.append(len(ids))
        return out_of_memory() if len(ids) > 4 else model(ids)

    meter = make_meter(forward=forward)
    with pytest.warns(RuntimeWarning, match=r"Trying again with batch_size=4\. This also holds"):
        meter.measure(Model())
    assert sizes == [8, 4, 4, 2]


def test_what_a_failed_pass_held_is_let_go_of_before_the_next(monkeypatch):
    held = []

    class Watched(Accumulator):
        alive = 0

        def __init__(self, *given, **keywords):
            held.append(Watched.alive)
            Watched.alive += 1
            super().__init__(*given, **keywords)

        def __del__(self):
            Watched.alive -= 1

        def add(self, *given):
            return out_of_memory() if self._at.shape[0] > 3 else super().add(*given)

    monkeypatch.setattr(team, "Accumulator", Watched)
    with pytest.warns(RuntimeWarning, match="3 layers at a time"):
        make_meter().measure(Model())
    assert held == [0, 0, 0]


def test_where_one_layer_does_not_fit_on_the_device_histograms_go_to_the_host(monkeypatch):
    expected = numbers(make_meter().measure(Model()))
    devices = []
    original = Accumulator.__init__

    def made(this, *given, device, **keywords):
        devices.append(device.type)
        if device.type == "meta":  # a device that has no memory
            out_of_memory()
        original(this, *given, device=device, **keywords)

    monkeypatch.setattr(Accumulator, "__init__", made)
    monkeypatch.setattr(ib.Meter, "_accumulates_on", on_a_device)
    monkeypatch.setattr(ib.Meter, "_host_layers", lambda *_: 6)
    meter = make_meter()
    with pytest.warns(RuntimeWarning, match=r"6 layers at a time, histograms in host memory\. This also holds"):
        assert numbers(meter.measure(Model())) == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True)
    assert devices == ["meta", "meta", "meta", "cpu"]


def on_a_device(meter, root):
    return torch.device("cpu" if meter._on_host else "meta")


def test_trimming_survives_another_c_library(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.trim()


# --- the summary


def test_summary_of_a_plan():
    meter = make_meter(orders=("token", "bigram"))
    summary = meter.plan_summary(num_layers=6)
    plan = meter.plan()
    assert summary.labels == sum(label_set.num_labels for label_set in plan.label_sets)
    once = sum(int(counts.share[counts.count == 1].sum() * plan.num_positions + 0.5) for counts in plan.counts)
    assert summary.singletons == once > 0
    assert summary.slots == plan.num_slots
    assert summary.bytes_by_part["slots"] == 4 * plan.num_slots * 6 * 100
    assert summary.passes == 1
    assert summary.seconds == summary.seconds_adding > 0
    assert "6 layers in 1 pass" in str(summary)
    assert "without the forward passes" in str(summary)
    of_model = meter.plan_summary(Model())
    assert of_model.num_layers == 6
    assert of_model.seconds_forward > 0
    ranks = meter.plan_summary(num_layers=6, num_ranks=4)
    assert ranks.bytes_by_part["slots"] == 4 * plan.num_slots * 2 * 100
    assert "on each of 4 ranks" in str(ranks)
    tight = make_meter(memory_budget=plan.memory(2, 100) + SLACK // 2, orders=("token", "bigram"))
    assert tight.plan_summary(num_layers=6).passes == tight.preflight(Model()).passes


@pytest.mark.parametrize("given", [{}, {"model": Model(), "num_layers": 3}])
def test_summary_of_neither_or_both(given):
    with pytest.raises(ValueError, match="plan_summary: expected either a model or num_layers="):
        make_meter().plan_summary(**given)
