"""Settings for the whole suite: no network, no files outside temporary directories, no silent skips."""

from __future__ import annotations

import os

# Before anything imports them: these are read at import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)
# Also for the processes that tests start; at the sizes of the tests more threads only fight each other, and the
# suite runs in two processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fnmatch
import gc
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SKIPS_FILE = Path(__file__).with_name("project") / "skips.txt"
# These files take longest, in this order. They start first, so that no worker is left alone with one at the end.
LONGEST = """
project/test_examples.py run/trainers/test_kill.py run/trainers/test_ranks.py run/trainers/test_resume.py
measuring/model/test_kinds.py lightning/test_callback.py measuring/model/test_codebook_ranks.py hf/test_callback.py
run/trainers/test_rank_faults.py measuring/ranks/test_equal.py measuring/ranks/test_faults.py probe/test_hub.py
lightning/test_logging.py lightning/test_selection.py measuring/test_jackknife.py run/trainers/test_broken_calls.py
run/trainers/test_points.py measuring/ranks/test_crews.py measuring/model/test_parallel.py lightning/test_averaging.py
cli/test_conventions.py project/studies/test_runs.py checkpoints/test_hub.py cli/test_demo.py estimator/test_fused.py
common/test_cache.py measuring/model/test_loss.py
""".split()


def read_permitted_skips(path: Path = SKIPS_FILE) -> dict[str, str]:
    """Node-id pattern -> reason."""
    permitted: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pattern, separator, reason = line.partition(" | ")
        if not separator or not reason.strip():
            raise pytest.UsageError(f"{path}:{number}: expected 'node id | reason', got {line!r}")
        permitted[pattern.strip()] = reason.strip()
    return permitted


PERMITTED_SKIPS = read_permitted_skips()


def fail_unless_permitted(report: Any) -> None:
    """Turn a skip (or xfail) that project/skips.txt does not name into a failure: it must not pass as green."""
    node = report.nodeid
    if report.outcome != "skipped" or any(node == p or fnmatch.fnmatchcase(node, p) for p in PERMITTED_SKIPS):
        return
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "xfail")
    report.outcome = "failed"
    report.longrepr = f"{node} was skipped ({said}), but {SKIPS_FILE.name} does not name it with a reason"
    if hasattr(report, "wasxfail"):
        del report.wasxfail


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    fail_unless_permitted(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    fail_unless_permitted(report)
    return report


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist: the files with the most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Leave out of every later collection of garbage what was imported: Trainers ask for one when they begin."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or modules in C report at exit what they have not freed


@pytest.fixture(autouse=True, scope="session")
def _cached(tmp_path_factory: pytest.TempPathFactory) -> Generator[None, None, None]:
    """What is built once is kept among the temporary files, once for all processes of the run, and not at home."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"))
        yield


@pytest.fixture(autouse=True)
def _seeded_and_contained(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same random numbers whichever tests ran before, and no files in the working or the home directory."""
    torch.manual_seed(0)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path_factory.getbasetemp()))
