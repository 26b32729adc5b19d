"""Models from a hub on localhost, by huggingface_hub's own functions."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from hub_server import Hub, commit_of
from safetensors.torch import save
from tiny_hf import tiny_model
from word_tokenizer import word_tokenizer

from ib_callback import Results
from ib_callback.checkpoints import load
from ib_callback.cli.main import main
from ib_callback.probe.several_tokenizers import texts_of

BRANCHES = ("stage1-step4-tokens4B", "stage1-step8-tokens8B")
EARLY, LATE = "made/tiny-early", "made/tiny"
ROOT = Path(__file__).parents[2]


def files_of(seed: int | None, tokenizer: bytes) -> dict[str, bytes]:
    """A repository as save_pretrained writes it; None: weights that are torn."""
    model = tiny_model(seed or 0)
    weights = save({name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"})
    config = {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode(),
        "model.safetensors": weights[: len(weights) // 2] if seed is None else weights,
        "optimizer.pt": bytes(50_000),
        "README.md": b"of no use",
    }


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, dict[str, bytes]]]:
    tokenizer = word_tokenizer().to_str().encode()
    early = {f"step{step}-tokens{step}B": files_of(step, tokenizer) for step in (1, 2)}
    late = {f"stage1-step{step}-tokens{step}B": files_of(step, tokenizer) for step in (4, 8, 16)}
    late["stage1-step32-tokens32B"] = files_of(None, tokenizer)
    late["stage1-step64-tokens64B"] = files_of(8, tokenizer)  # the weights of another step
    late["main"] = files_of(16, tokenizer)
    late["stage2-step4-tokens1B"] = files_of(20, tokenizer)
    return {EARLY: {"main": {}, **early}, LATE: late}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    words = ["abcdefghij"[int(i)] for i in torch.randint(10, (6 * 16,), generator=generator)]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(words[i : i + 16])}) + "\n" for i in range(0, 96, 16)))
    return path


OPTIONS = [
    "-o", "results.jsonl", "--documents", "documents.jsonl", "--max-length", "16", "--num-sequences", "6",
    "--num-bins", "12", "--order", "token",
]  # fmt: skip


# As `python -m ib_callback`; what runs in the background inherits that it ignores Ctrl-C.
_AS_A_MODULE = (
    "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('ib_callback', run_name='__main__')"
)


def started(folder: Path, hub: Hub, *arguments: str) -> subprocess.Popen[str]:
    # tests/conftest.py turns the network off; what is tested here is the way there.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    inherited |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _AS_A_MODULE, "measure", *arguments, *OPTIONS],
        env=inherited | {"PYTHONPATH": str(ROOT)}, cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def hub(models: Any, tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process, as if its environment had named it at the start."""
    monkeypatch.chdir(tmp_path)
    with Hub(models=models) as served:
        turn_to(served, tmp_path, monkeypatch)
        yield served


def turn_to(served: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = {
        "ENDPOINT": served.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": served.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "home" / "hub"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


def measure(*arguments: str, output: str = "results.jsonl") -> int:
    return main(["measure", *arguments, *OPTIONS, "-o", output])


def downloaded(hub: Hub) -> list[str]:
    """Weights that were asked for, "owner/name@branch", each time."""
    found = []
    for request in hub.requests:
        method, _, path = request.partition(" ")
        parts = path.strip("/").split("/")
        if method == "GET" and parts[-1] == "model.safetensors":
            found.append(f"{'/'.join(parts[:2])}@{hub.branch('/'.join(parts[:2]), parts[3])}")
    return found


def test_two_repositories_are_one_trajectory(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    broken, equal = f"{LATE}@stage1-step32-tokens32B", f"{LATE}@stage1-step64-tokens64B"
    cut = f"{LATE}@stage1-step16-tokens16B"
    globs = ["--revisions", "step*", "--revisions", "stage1-*", "--revisions", "main"]
    hub.drops[f"{cut}/model.safetensors"] = 2
    assert measure(EARLY, LATE, "--name", "tiny", *globs, "--evict") == 1
    told = capsys.readouterr().err.splitlines()[-4:]
    first = downloaded(hub)
    hub.requests.clear()
    assert measure(EARLY, LATE, "--name", "tiny", *globs, "--evict") == 1
    second = downloaded(hub)
    # The main branch of the first repository has no weights at all.
    assert told[0] == "ib-callback: equal weights: tiny stage1-step64-tokens64B and stage1-step8-tokens8B"
    assert told[1] == f"ib-callback: equal weights: tiny {LATE}@main and stage1-step16-tokens16B"
    assert told[2].startswith("ib-callback: not measured: tiny stage1-step32-tokens32B: ")
    assert told[3].startswith(
        f"ib-callback: not measured: tiny {EARLY}@main: ModelError: expected weights in files named model*"
    )
    results = Results.load(tmp_path / "results.jsonl")
    assert [*results] == ["tiny stage1", "tiny"]
    course = results["tiny stage1"]
    assert course.steps == [1, 2, 4, 8, 16, 32]
    assert [point.tokens_seen for point in course] == [step * 10**9 for step in (1, 2, 4, 8, 16, 32)]
    assert [point.error is None for point in course] == [True] * 5 + [False]
    assert [point.error is None for point in results["tiny"]] == [False]
    assert equal not in first
    assert {broken, cut} < set(first)
    assert hub.drops[f"{cut}/model.safetensors"] == 0
    # What failed is tried again, and nothing else.
    assert set(second) == {broken}
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 7
    assert not list((tmp_path / "home").glob("hub/models--*/snapshots/*/model.safetensors")), "all are evicted"
    assert not any("optimizer" in request or "README" in request for request in hub.requests)


def test_the_weights_that_were_measured_are_those_of_the_revision(models: Any, tmp_path: Path, hub: Hub) -> None:
    tiny_model(8).save_pretrained(tmp_path / "local")
    for name, content in models[LATE]["main"].items():
        if name.startswith("tokenizer"):
            (tmp_path / "local" / name).write_bytes(content)
    assert measure(f"{LATE}@stage1-step8-tokens8B", "local", "--initial") == 0
    results = Results.load(tmp_path / "results.jsonl")
    (initial, on_hub), (untrained, local) = results[LATE], results["local"]
    assert (initial.step, on_hub.step, untrained.step, local.step) == (0, 8, 0, None)
    assert (on_hub.orders, on_hub.loss) == (local.orders, local.loss)
    assert (initial.orders, initial.loss) == (untrained.orders, untrained.loss)
    assert initial.loss != on_hub.loss
    origin = results.origins(LATE)[1]
    assert origin.source == f"{LATE}@{commit_of(LATE, 'stage1-step8-tokens8B')}"
    assert (origin.family, origin.num_parameters) == ("gpt2", sum(p.numel() for p in tiny_model().parameters()))


def test_a_model_in_the_cache_needs_no_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(LATE) == 0
    first = Results.load(tmp_path / "results.jsonl")[LATE]
    (tmp_path / "results.jsonl").unlink()
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert measure(LATE) == 0
    assert hub.requests == []
    assert Results.load(tmp_path / "results.jsonl")[LATE][0].orders == first[0].orders


def test_globs_of_revisions_are_matched_against_the_cache_without_a_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models[LATE]["stage1-step12-tokens12B"] = hub.models[LATE]["stage1-step8-tokens8B"]
    for step in (4, 8, 12):
        assert measure(f"{LATE}@stage1-step{step}-tokens{step}B", output=f"{step}.jsonl") == 0
    del hub.models[LATE]["stage1-step12-tokens12B"]
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert measure(LATE, "--revisions", "stage1-*") == 0
    assert hub.requests == []
    results = Results.load(tmp_path / "results.jsonl")
    assert results[LATE].steps == [4, 8]
    assert results.origins(LATE)[0].source == f"{LATE}@{commit_of(LATE, BRANCHES[0])}"
    assert f"equal weights: {LATE} stage1-step12-tokens12B and stage1-step8-tokens8B" in capsys.readouterr().err
    assert measure(LATE, "--revisions", "stage7-*") == 2
    assert "the cache on this machine has no revision that matches 'stage7-*'" in capsys.readouterr().err


def test_tokens_in_names_are_rounded_and_steps_tell_better(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"{LATE}@{BRANCHES[0]}"
    assert measure(where, output="named.jsonl") == 0
    assert "the numbers of tokens come from names, which round them; --tokens-per-step N" in capsys.readouterr().err
    assert measure(where, "--tokens-per-step", "700", output="counted.jsonl") == 0
    assert "rounded" not in capsys.readouterr().err
    tokens = [Results.load(tmp_path / f"{name}.jsonl")[LATE][0].tokens_seen for name in ("named", "counted")]
    assert tokens == [4 * 10**9, 4 * 700]


def test_control_c_does_not_wait_for_a_download(models: Any, tmp_path: Path, documents: Path) -> None:
    stalled = f"{LATE}@{BRANCHES[0]}/model.safetensors"
    with Hub(models=models) as hub:
        hub.stalls.add(stalled)
        process = started(tmp_path, hub, f"{LATE}@{BRANCHES[0]}")
        assert hub.stalled.wait(240)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert process.returncode == 130
        assert err.splitlines()[-1] == "ib-callback: interrupted"
        assert downloaded(hub) == [f"{LATE}@{BRANCHES[0]}"], "it was not asked for again, as when it had timed out"


def test_stages_are_courses_and_long_ones_are_thinned(hub: Hub, tmp_path: Path) -> None:
    assert measure(LATE, "--revisions", "stage*-step[148]*", "--max-points", "2", "--tokenizer", "t.json") == 2
    word_tokenizer().save(str(tmp_path / "t.json"))
    assert measure(LATE, "--revisions", "stage*-step[148]*", "--max-points", "2", "--tokenizer", "t.json") == 0
    results = Results.load(tmp_path / "results.jsonl")
    assert {name: t.steps for name, t in results.items()} == {f"{LATE} stage1": [4, 16], f"{LATE} stage2": [4]}


def test_what_was_in_the_cache_before_is_left_there(hub: Hub, tmp_path: Path) -> None:
    kept, gone = (tmp_path / f"home/hub/models--made--tiny/snapshots/{commit_of(LATE, b)}" for b in BRANCHES)
    assert measure(f"{LATE}@{BRANCHES[0]}") == 0
    assert measure(LATE, "--revisions", "stage1-step[48]-*", "--evict", "--seed", "1") == 0
    assert kept.is_dir()
    assert not gone.exists()


def test_shards_share_the_work_and_the_documents(hub: Hub, tmp_path: Path) -> None:
    for number in ("1", "2"):
        assert measure(EARLY, "--revisions", "step*", "--shard", f"{number}/2", output=f"{number}.jsonl") == 0
    parts = [Results.load(tmp_path / f"{number}.jsonl")[EARLY] for number in (1, 2)]
    assert [part.steps for part in parts] == [[1], [2]]
    assert parts[0][0].settings == parts[1][0].settings


def test_a_revision_that_cannot_be_listed_does_not_end_the_sweep(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.unlisted.add(f"{LATE}@{BRANCHES[0]}")
    assert measure(LATE, "--revisions", "stage1-step[48]-*") == 1
    last = capsys.readouterr().err.splitlines()[-1].partition(f"{BRANCHES[0]}: ")[2]
    assert last.startswith("ModelError: its files cannot be listed: RevisionNotFoundError")
    assert [point.error is None for point in Results.load(tmp_path / "results.jsonl")[LATE]] == [False, True]
    hub.unlisted.clear()
    assert measure(LATE, "--revisions", "stage1-step[48]-*") == 0
    assert [point.error is None for point in Results.load(tmp_path / "results.jsonl")[LATE]] == [True, True]


def test_of_several_gguf_files_one_is_named_and_downloaded(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models = {"made/quantised": {"main": {"Q4.gguf": bytes(2_000), "Q8.gguf": bytes(3_000)}}}
    monkeypatch.setattr(load, "is_installed", lambda _: False)
    word_tokenizer().save(str(tmp_path / "t.json"))
    assert measure("made/quantised", "--tokenizer", "t.json") == 1
    assert (
        "expected one GGUF file, got 2. Choose one with --gguf. The files: Q4.gguf, Q8.gguf" in capsys.readouterr().err
    )
    assert measure("made/quantised", "--tokenizer", "t.json", "--gguf", "*8*") == 1
    assert 'needs the package "gguf"' in capsys.readouterr().err
    assert [request for request in hub.requests if request.startswith("GET") and request.endswith(".gguf")] == [
        f"GET /made/quantised/resolve/{commit_of('made/quantised', 'main')}/Q8.gguf"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["made/nothing"],
            "made/nothing: there is no such path, the hub cannot be reached (RepositoryNotFoundError",
        ),
        (
            [LATE, "--revisions", "epoch*"],
            "expected a revision that matches 'epoch*', but none of its 7 revisions does: ",
        ),
        (["./nowhere"], "./nowhere: expected a folder, a file, or a name on the hub. There is no such folder or file"),
    ],
)
def test_what_is_not_there_is_said_at_once(
    hub: Hub, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


def test_known_corpora_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"document {i}", "url": "u"} for i in range(3)]
    told = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
    pairs = [{"prompt": "why", "chosen": told, "rejected": [told[0], {"role": "assistant", "content": "no"}]}]
    table = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(pairs), table)
    shard = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    repositories = {
        "allenai/c4": {"en/c4-validation.00000-of-00001.json.gz": shard},
        "allenai/llama-3.1-tulu-3-8b-preference-mixture": {"data/train-00000-of-00001.parquet": table.getvalue()},
    }
    with Hub(repositories) as served:
        turn_to(served, tmp_path, monkeypatch)
        assert list(texts_of("c4")) == ["document 0", "document 1", "document 2"]
        assert list(texts_of("tulu")) == ["User: why\n\nAssistant: because"]


IN_THE_WAY = {
    "no network": ("ConnectError", "There is no network (or offline mode is on, HF_HUB_OFFLINE=1): "),
    "offline": ("OfflineModeIsEnabled", "There is no network (offline mode, HF_HUB_OFFLINE=1): "),
    "too many": ("429", "The hub limits the number of requests (429): wait for 1 s and try again, log in (HF_TOKEN)"),
    "cut": ("RemoteProtocolError", "The download was cut off: try again; if the connection stays unstable: "),
}
ASKING = {
    "a model": (["measure", LATE, *OPTIONS], "hf download made/tiny"),
    "a tokenizer": (
        ["probe", "build", "--tokenizer", LATE, "--dataset", "documents.jsonl", "-o", "p.safetensors"],
        "--tokenizer tokenizer.json",
    ),
    "a configuration": (
        ["measure", "weights.pt", *OPTIONS, "--tokenizer", "tokenizer.json", "--config", LATE],
        "--config config.json",
    ),
    "documents": (["measure", "model", *OPTIONS, "--documents", "c4"], '"builtin"'),
    "a dataset": (
        ["probe", "build", "--tokenizer", "tokenizer.json", "--dataset", "c4", "-o", "p.safetensors"],
        "Probe.builtin(",
    ),
}


@pytest.mark.parametrize("asking", ASKING)
@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_in_the_way_of_the_network_is_one_line_with_the_ways_out(
    kind: str,
    asking: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    shard = gzip.compress(b'{"text": "a b c d e f g h"}\n' * 4)
    hub.repositories["allenai/c4"] = {"en/c4-validation.00000-of-00001.json.gz": shard}
    (tmp_path / "tokenizer.json").write_text(word_tokenizer().to_str())
    tiny_model().save_pretrained(tmp_path / "model")
    torch.save(tiny_model().state_dict(), "weights.pt")
    if kind == "no network":
        hub.endpoint = "http://127.0.0.1:9"  # where nobody listens
        turn_to(hub, tmp_path, monkeypatch)
    elif kind == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    elif kind == "too many":
        hub.refusals["/"] = 10**6
    else:
        for path in (
            f"{LATE}@main/tokenizer.json",
            f"{LATE}@main/config.json",
            "allenai/c4/en/c4-validation.00000-of-00001.json.gz",
        ):
            hub.drops[path] = 10**6
    arguments, way_out = ASKING[asking]
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("ib-callback: ")
    for part in (*IN_THE_WAY[kind], way_out):
        assert part in line
    if kind in ("no network", "offline"):
        assert waits == []


def test_a_hub_that_asks_to_come_again_is_asked_again_after_as_long(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.refusals[f"api/models/{LATE}/refs"] = 2
    assert measure(LATE) == 0
    assert waits == [1.0, 1.0]
    assert f"{LATE}: the hub limits the number of requests (429); trying again in 1 s" in capsys.readouterr().err


def test_a_hub_that_lets_nobody_list_files_for_a_while_is_asked_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.refusals[f"api/models/{LATE}/tree"] = 8  # huggingface_hub itself asks six times
    assert measure(LATE) == 0
    assert "trying again in 1 s" in capsys.readouterr().err
