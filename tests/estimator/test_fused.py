"""The Triton kernels: equal to torch's operations, compiled for GPUs, known to fake tensors, left alone where wrong."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ib_callback.common import optional
from ib_callback.estimator import fused
from ib_callback.estimator.quantise import assign

GPU = torch.device("cuda", 0)


@pytest.fixture
def on_gpu(monkeypatch):
    """As if there were a GPU, with Triton, that nothing is known of."""
    monkeypatch.setattr(optional, "is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(fused, "_verdicts", {})
    monkeypatch.delenv("IB_CALLBACK_TRITON", raising=False)


def test_the_interpreted_kernels_equal_torch():
    module = Path(__file__).with_name("interpreted_fused.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(module)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = plain | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("dtype", "num_bins", "capability"), [(torch.bfloat16, 100, 90), (torch.float32, 1000, 80), (None, 100, 80)]
)
def test_the_kernels_compile_for_gpus_and_fit(dtype, num_bins, capability, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does, which needs no GPU; dtype None: the kernel of entropies."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if dtype is None:
        kernel, options = fused._kernels()[1], fused._options(4, 1)
        constants = {"BINS": 128, "HISTOGRAMS": 8}
        types = ["*fp32", "*i64", "*fp64", "i32", "i32", "i32"]
    else:
        bins, rows, step, stages = fused._shape(num_bins, dtype)
        kernel, options = fused._kernels()[0], fused._options(8, stages)
        parts, of = (1, "*fp32") if dtype == torch.float32 else (2, "*bf16")
        constants = {"PARTS": parts, "BINS": bins, "ROWS": rows, "STEP": step, "WITH_UNIT": True, "WIDE": False}
        types = [of, "i32", "*i64", of, "*fp32", "*fp32", "i32", "*fp32", "i32", "i32", "i32", "fp32"]
    signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    # As of tensors of torch, and of a dim that is a multiple of 16.
    aligned = {(n,): [["tt.divisibility", 16]] for n, of in enumerate(types) if of[0] == "*" or n in (1, 9)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.parametrize(("dtype", "blocks"), [(torch.bfloat16, 2), (torch.float32, 2)])
def test_fake_tensors_know_what_the_kernels_put_out(dtype, blocks):
    with FakeTensorMode():
        rows, points = torch.empty(90, 64, dtype=dtype, device=GPU), torch.empty(2, 100, 64, dtype=dtype, device=GPU)
        positions, table = torch.empty(70, dtype=torch.long, device=GPU), torch.empty(70, 3, 100, device=GPU)
        for with_unit in (True, False):
            norms, unit = fused.quantise(rows, positions, points, 2.5, table.select(1, 1), with_unit)
            assert norms.shape == (70,) and unit.shape == (blocks if with_unit else 0, 64)
            assert norms.dtype == unit.dtype == torch.float32 and norms.device == unit.device == GPU
        for index, count in ((None, 70), (positions.narrow(0, 0, 8), 8)):
            found = fused.entropies(table.reshape(70, 300), index, 100)
            assert (found.shape, found.dtype, found.device) == ((count, 3), torch.float64, GPU)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rows", torch.empty(9, 8).double()),
        ("rows", torch.empty(8, 9).T),
        ("positions", torch.arange(5.0)),
        ("positions", torch.arange(10)[::2]),
        ("points", torch.empty(1, 20, 8).half()),
        ("points", torch.empty(1, 20, 7)),
        ("points", torch.empty(1, 8, 20).transpose(1, 2)),
        ("out", torch.empty(4, 20)),
        ("out", torch.empty(20, 5).T),
        ("num_bins", 1025),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(name, wrong):
    bins = wrong if name == "num_bins" else 20
    given = {
        "rows": torch.empty(9, 8),
        "positions": torch.arange(5),
        "points": torch.empty(1, bins, 8),
        "out": torch.empty(5, bins),
    }
    given |= {} if name == "num_bins" else {name: wrong}
    with pytest.raises(ValueError, match=f"^{name}: "):
        fused.quantise(given["rows"], given["positions"], given["points"], 1.0, given["out"], True)


@pytest.mark.parametrize(
    ("table", "index", "num_bins", "message"),
    [
        (torch.empty(4, 21), None, 10, "^table: "),
        (torch.empty(20, 4).T, None, 10, "^table: "),
        (torch.empty(4, 20).half(), None, 10, "^table: "),
        (torch.empty(4, 20), torch.arange(3.0), 10, "^index: "),
        (torch.empty(4, 1025), None, 1025, "^num_bins: "),
    ],
)
def test_a_table_that_would_be_read_wrongly_is_refused(table, index, num_bins, message):
    with pytest.raises(ValueError, match=message):
        fused.entropies(table, index, num_bins)


@pytest.mark.parametrize("without", ["GPU", "Triton", "leave", "capability"])
def test_without_what_it_needs_it_is_not_there_and_says_nothing(without, on_gpu, monkeypatch):
    monkeypatch.setattr(fused, "_differences", lambda device: "")
    if without == "Triton":
        monkeypatch.setattr(optional, "is_installed", lambda module: False)
    elif without == "leave":
        monkeypatch.setenv("IB_CALLBACK_TRITON", "0")
    elif without == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fused.available(torch.device("cpu") if without == "GPU" else GPU)


def test_fake_tensors_are_not_compared(on_gpu):
    with FakeTensorMode():
        assert fused.available(GPU)
    assert fused._verdicts == {}


def test_the_self_check_runs_once_for_each_device(on_gpu, monkeypatch):
    checked = []
    monkeypatch.setattr(fused, "_differences", lambda device: checked.append(device) or "")
    assert fused.available(GPU) and fused.available(GPU) and fused.available(torch.device("cuda", 1))
    assert checked == [GPU, torch.device("cuda", 1)]


@pytest.mark.parametrize("fault", ["wrong numbers", "error"])
def test_where_the_self_check_fails_torch_is_used_and_that_is_said_once(fault, on_gpu, monkeypatch):
    def by_torch(rows, positions, points, divisor, out, with_unit):
        if fault == "error":
            raise RuntimeError("no kernel image")
        states, parts = rows.double()[positions], points.double().sum(0)
        assigned, norms = assign(states, parts, divisor)
        out[:] = assigned
        out[3, 5] += 2e-5
        return norms, (states / norms.unsqueeze(-1)).sum(0, keepdim=True)

    differences = fused._differences
    monkeypatch.setattr(fused, "quantise", by_torch)
    monkeypatch.setattr(fused, "entropies", lambda table, index, bins: fused.entropy(table.view(35, 2, bins))[index])
    monkeypatch.setattr(fused, "_differences", lambda device: differences(torch.device("cpu")))
    names = ("bfloat16", "float16", "float32")
    said = "; ".join(f"assignments of torch.{name} differ by 2.0e-05" for name in names)
    with pytest.warns(RuntimeWarning, match=said if fault == "wrong numbers" else "no kernel image") as caught:
        found = [fused.available(GPU) for _ in range(2)]
    assert found == [False, False]
    assert len(caught) == 1 and "torch's own operations" in str(caught[0].message)
    assert caught[0].filename == __file__
