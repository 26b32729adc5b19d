"""C4 and Tulu from a hub on localhost: the real calls, connections that drop, bad shards, and no network at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Hub
from word_tokenizer import word_tokenizer

from ib_callback import Probe

LETTERS = np.array(list("abcdefghij"))
TULU = "allenai/llama-3.1-tulu-3-8b-preference-mixture"

# What happens is printed as JSON: a probe's fingerprint and source, or an error.
SCRIPT = """
import json, sys, time, warnings
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.01))  # of all the layers that try again
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 16  # bytes that are kept when a connection drops, or a multiple of it
from tokenizers import Tokenizer
from ib_callback import Probe

tokenizer = Tokenizer.from_file(sys.argv[1])
results = {}
for name, (constructor, arguments, keywords) in json.load(sys.stdin).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            probe = getattr(Probe, constructor)(*arguments, tokenizer, **keywords)
            results[name] = {"fingerprint": probe.fingerprint, "source": probe.source, "names": probe.label_names}
        except ValueError as error:
            results[name] = {"error": str(error)}
    results[name]["warned"] = [str(w.message) for w in caught if w.category is UserWarning]
    results[name]["datasets"] = "datasets" in sys.modules
print(json.dumps(results))
"""


def document(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(LETTERS, words))


def shard(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def card(config: str, split: str, path: str) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n---\n".encode()
    )


def c4_rows() -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    lengths = [30, 5, 40, 25, 30, 60, 35, 3, 30, 30, 28, 44]
    return [
        {"text": document(rng, n), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{i}"}
        for i, n in enumerate(lengths)
    ]


def tulu_rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    rows = []
    for i in range(8):
        prompt = {"content": document(rng, 6), "role": "user"}
        answers = [{"content": document(rng, 5), "role": "assistant"} for _ in range(2)]
        if i == 2:
            answers[1] = answers[0]
        if i == 4:
            answers[0] = {"content": "", "role": "assistant"}
        row = {"id": str(i), "source": "made", "prompt": prompt["content"]}
        rows.append(row | {"chosen": [prompt, answers[0]], "rejected": [prompt, answers[1]]})
    return rows


def repositories() -> dict[str, dict[str, bytes]]:
    rows = c4_rows()
    parts = [rows[:5], [], rows[5:9], rows[9:]]  # one shard is empty
    c4 = {f"en/c4-validation.{i:05}-of-00004.json.gz": shard(part) for i, part in enumerate(parts)}
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(tulu_rows()), parquet)
    whole = shard(rows[5:])
    # Other splits of C4: a shard that is cut off at its source, and one whose connection never holds.
    c4["en/c4-train.00000-of-00002.json.gz"] = shard(rows[:5])
    c4["en/c4-train.00001-of-00002.json.gz"] = whole[: len(whole) // 2]
    c4["en/c4-test.00000-of-00002.json.gz"] = shard(rows[:5])
    c4["en/c4-test.00001-of-00002.json.gz"] = whole
    pattern = "data/*.json.gz"
    renamed = [{"content": row["text"], "url": row["url"]} for row in rows]
    return {
        "allenai/c4": {"README.md": card("en", "validation", "en/c4-validation.*.json.gz"), **c4},
        TULU: {
            "README.md": card("default", "train", "data/train-*"),
            "data/train-00000-of-00001.parquet": parquet.getvalue(),
        },
        "made/truncated": {
            "README.md": card("default", "test", pattern),
            "data/0.json.gz": shard(rows[:5]),
            "data/1.json.gz": whole[: len(whole) // 2],
        },
        "made/truncated-parquet": {
            "README.md": card("default", "train", "data/train-*"),
            "data/train-00000-of-00001.parquet": parquet.getvalue()[:-100],
        },
        "made/renamed": {"README.md": card("default", "test", pattern), "data/0.json.gz": shard(renamed)},
        "made/renamed-late": {
            "README.md": card("default", "test", pattern),
            "data/0.json.gz": shard(rows[:5]),
            "data/1.json.gz": shard([{"url": row["url"]} for row in rows[5:]]),
        },
        "made/splits": {"train.jsonl": b'{"text": "a"}\n', "test.jsonl": b'{"text": "b"}\n'},
    }


BROKEN = "allenai/c4/en/c4-validation.00002-of-00004.json.gz"
NEVER_WHOLE = "allenai/c4/en/c4-test.00001-of-00002.json.gz"
STEPS: dict[str, Any] = {
    "c4": ("from_c4", [], {"num_sequences": 8, "max_length": 32}),
    "c4 truncated": ("from_c4", [], {"num_sequences": 8, "split": "train"}),
    "c4 cut off": ("from_c4", [], {"num_sequences": 8, "split": "test"}),
    "c4 within a shard": ("from_c4", [], {"num_sequences": 2, "split": "test"}),
    "tulu": ("from_tulu", [], {"num_sequences": 12, "max_length": 32}),
    "truncated": ("from_dataset", ["made/truncated"], {"num_sequences": 8}),
    "truncated parquet": ("from_preferences", ["made/truncated-parquet"], {"num_sequences": 2}),
    "renamed": ("from_dataset", ["made/renamed"], {"num_sequences": 4}),
    "other column": ("from_dataset", ["made/renamed"], {"num_sequences": 4, "text_column": "content"}),
    "renamed late": ("from_dataset", ["made/renamed-late"], {"num_sequences": 8}),
    "several splits": ("from_dataset", ["made/splits"], {}),
    "no such split": ("from_dataset", ["made/splits"], {"split": "dev"}),
    "no such dataset": ("from_dataset", ["made/nothing"], {}),
}


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    # tests/conftest.py turns the network off; what is tested here is the way there.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder / "tokenizer.json")],
        env=inherited | {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results_of(process: subprocess.Popen[str], steps: dict[str, Any]) -> dict[str, Any]:
    printed, errors = process.communicate(json.dumps(steps))
    assert process.returncode == 0, errors
    return json.loads(printed)


def run(steps: dict[str, Any], folder: Path, **environment: str) -> dict[str, Any]:
    return results_of(start(folder, **environment), steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def online(folder: Path) -> dict[str, Any]:
    with Hub(repositories()) as hub:
        # Again and again, each time half of what is left gets through; then for ever.
        hub.drops[BROKEN] = 7
        hub.drops[NEVER_WHOLE] = 10**6
        hub.drops["made/renamed/data/0.json.gz"] = 3  # streamed: `datasets` tries again
        hub.drops[f"{TULU}/data/train-00000-of-00001.parquet"] = 1
        results = run(STEPS, folder, HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "home"))
        results["requests"] = hub.requests
        results["drops left"] = dict(hub.drops)
    return results


def test_c4_over_a_connection_that_drops_again_and_again(online: dict[str, Any]) -> None:
    result = online["c4"]
    expected = Probe.from_texts(
        [row["text"] for row in c4_rows()], word_tokenizer(), num_sequences=8, max_length=32, name="c4"
    )
    assert len(expected) == 8  # from the first shard, past the empty one, and from the broken one
    assert result["fingerprint"] == expected.fingerprint
    assert online["drops left"][BROKEN] == 0
    downloaded = [request for request in online["requests"] if request.startswith("GET /datasets/allenai/c4/")]
    # Taken up where it broke off: five attempts that get no further would have been the end.
    assert sum("c4-validation.00002-of" in request for request in downloaded) == 7 + 1
    assert [sum(f"c4-validation.0000{i}-of" in request for request in downloaded) for i in (0, 1, 3)] == [1, 1, 1]
    source = result["source"]
    assert (source["dataset"], source["config"], source["split"]) == ("allenai/c4", "en", "validation")
    assert source["revision"] == COMMIT
    # Of the 10 texts read, two have fewer than 16 tokens.
    assert (source["texts_read"], source["texts_too_short"]) == ("10", "2")


def test_tulu(online: dict[str, Any]) -> None:
    result = online["tulu"]
    with pytest.warns(UserWarning, match="left out 2 of 8 pairs: 1 with equal texts or scores, 1 with an empty"):
        expected = Probe.from_preferences(tulu_rows(), word_tokenizer(), num_sequences=12, max_length=32)
    assert result["fingerprint"] == expected.fingerprint
    assert result["names"] == {"preference": ["rejected", "preferred"]}
    (warned,) = result["warned"]
    assert warned.startswith("left out 2 of 8 pairs")
    assert (result["source"]["dataset"], result["source"]["split"]) == (TULU, "train")
    assert online["drops left"][f"{TULU}/data/train-00000-of-00001.parquet"] == 0


def test_a_truncated_shard_is_an_error_and_no_shorter_probe(online: dict[str, Any]) -> None:
    error = online["truncated"]["error"]
    assert error.startswith("made/truncated: reading failed after 5 rows (EOFError: Compressed file ended")
    assert "There is no network" not in error
    error = online["truncated parquet"]["error"]
    assert error.startswith(
        "made/truncated-parquet: reading failed at the start (ArrowInvalid: Parquet magic bytes not"
    )
    error = online["c4 truncated"]["error"]
    assert "c4-train.00001-of-00002.json.gz: reading failed at the start (EOFError: Compressed file ended" in error
    assert "There is no network" not in error


def test_a_shard_that_never_comes_through_is_an_error_where_it_is_needed(online: dict[str, Any]) -> None:
    error = online["c4 cut off"]["error"]
    assert error.startswith("allenai/c4: reading failed after 5 rows (RemoteProtocolError: ")
    assert "Probe.builtin(" in error
    expected = Probe.from_texts([row["text"] for row in c4_rows()], word_tokenizer(), num_sequences=2)
    assert online["c4 within a shard"]["fingerprint"] == expected.fingerprint


def test_a_missing_column_is_named_with_those_that_are_there(online: dict[str, Any]) -> None:
    error = online["renamed"]["error"]
    assert "made/renamed: expected a column 'text', got the columns content, url." in error
    assert "text_column=" in error
    expected = Probe.from_texts([row["text"] for row in c4_rows()], word_tokenizer(), num_sequences=4)
    assert online["other column"]["fingerprint"] == expected.fingerprint
    assert online["drops left"]["made/renamed/data/0.json.gz"] == 0


def test_a_column_that_is_missing_later_is_counted(online: dict[str, Any]) -> None:
    result = online["renamed late"]
    assert result["source"]["texts_without_text"] == "7"
    (warned,) = result["warned"]
    assert "asked for 8 sequences, got 4: there were 12 texts, and 1 of them has fewer" in warned
    assert "7 of them have no text" in warned


def test_names_that_are_wrong(online: dict[str, Any]) -> None:
    assert "made/splits: expected split= to be one of train, test, got None" in online["several splits"]["error"]
    assert "dev" in online["no such split"]["error"]
    assert "made/nothing" in online["no such dataset"]["error"]
    for name in ("several splits", "no such split", "no such dataset"):
        assert "There is no network" not in online[name]["error"]


def test_with_a_warm_cache_no_network_is_needed(online: dict[str, Any], folder: Path) -> None:
    steps = {
        "c4": STEPS["c4"],
        "tulu": STEPS["tulu"],
        "more": ("from_c4", [], {"num_sequences": 9}),
        "nothing": ("from_tulu", [], {"num_sequences": 2, "cache": False}),
    }
    results = run(
        steps, folder, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="/nowhere"
    )
    for name in ("c4", "tulu"):
        assert results[name]["fingerprint"] == online[name]["fingerprint"]
        assert results[name]["source"] == online[name]["source"]
        assert results[name]["warned"] == online[name]["warned"]
        assert not results[name]["datasets"]
    for name, dataset in (("more", "allenai/c4"), ("nothing", TULU)):
        error = results[name]["error"]
        assert error.startswith(f"{dataset}: reading failed at the start (OfflineModeIsEnabled")
        for way in ("The cache", "ib-callback probe build", "Probe.load", "Probe.from_dataset(", "Probe.builtin("):
            assert way in error


def test_a_hub_that_does_not_answer(online: dict[str, Any], folder: Path) -> None:
    steps = {"c4": STEPS["c4"], "more": ("from_c4", [], {"num_sequences": 9})}
    results = run(steps, folder, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(folder / "other home"))
    assert results["c4"]["fingerprint"] == online["c4"]["fingerprint"]
    assert "allenai/c4: reading failed at the start (ConnectError" in results["more"]["error"]
    assert "Probe.builtin(" in results["more"]["error"]


def test_builders_that_follow_one_that_was_killed_in_its_download(folder: Path, tmp_path: Path) -> None:
    steps = {"c4": ("from_c4", [], {"num_sequences": 2})}
    shard = "allenai/c4/en/c4-validation.00000-of-00004.json.gz"
    with Hub(repositories()) as hub:
        hub.stalls.add(shard)
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
        with start(folder, **environment) as killed:
            assert killed.stdin is not None
            killed.stdin.write(json.dumps(steps))
            killed.stdin.close()
            assert hub.stalled.wait(60)
            killed.kill()
        hub.stalls.clear()
        with ThreadPoolExecutor() as pool:
            others = [start(folder, **environment) for _ in range(2)]
            found = list(pool.map(lambda process: results_of(process, steps)["c4"], others))
        # Once by the one that was killed, and by one of the others.
        asked = [request for request in hub.requests if request.startswith("GET /datasets/allenai/c4/resolve")]
        assert len([request for request in asked if request.endswith("00000-of-00004.json.gz")]) == 2
    expected = Probe.from_texts([row["text"] for row in c4_rows()], word_tokenizer(), num_sequences=2)
    assert [result["fingerprint"] for result in found] == [expected.fingerprint] * 2
