"""Probes of datasets of every kind, and the cache."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback import Probe, ProbeError
from ib_callback.probe import _rows
from ib_callback.probe._tokenizing import tokenizer_hash

TEXTS = ["a b c d", "e", "f g h", "i j", "a a a a a a"]
ROWS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
SETTINGS: dict[str, Any] = {"num_sequences": 3, "min_length": 4, "max_length": 6}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "ib_callback" / "probes"


def expected() -> Probe:
    return Probe.from_texts(TEXTS, word_tokenizer(), **SETTINGS)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# ---------------------------------------------------------------- kinds of datasets


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


def json_lines(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def json_array(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


def csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("n,text\n" + "".join(f"{row['n']},{row['text']}\n" for row in ROWS))
    return path


def compressed(folder: Path) -> Path:
    path = folder / "rows.json.gz"
    path.write_bytes(gzip.compress(json_lines(folder).read_bytes()))
    return path


def parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def text(folder: Path) -> Path:
    path = folder / "rows.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def folder_of_shards(folder: Path) -> Path:
    shards = folder / "shards"
    shards.mkdir()
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        (shards / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shards


def saved_to_disk(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


KINDS: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: ROWS,
    "generator": lambda _: generated(),
    "Dataset": lambda _: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "IterableDataset": lambda _: datasets.IterableDataset.from_generator(generated),
    "jsonl": json_lines,
    "str": lambda folder: str(json_lines(folder)),
    "json.gz": compressed,
    "parquet": parquet,
    "json": json_array,
    "csv": csv,
    "txt": text,
    "folder": folder_of_shards,
    "saved": saved_to_disk,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_gives_the_same_probe(kind: str, tmp_path: Path, own_cache: Path) -> None:
    dataset = KINDS[kind](tmp_path)
    probe = Probe.from_dataset(dataset, word_tokenizer(), **SETTINGS)
    assert probe.fingerprint == expected().fingerprint
    counts = {key: value for key, value in probe.source.items() if key.startswith("texts_")}
    assert counts == {"texts_read": "4", "texts_too_short": "1", "texts_without_text": "0"}
    # What has no identity that lasts is not cached.
    assert probe.name == (dataset.split("/")[-1] if kind == "str" else getattr(dataset, "name", "dataset"))
    assert len(files_in(own_cache)) == (kind not in ("list", "generator", "IterableDataset"))


def test_splits_and_rows_to_skip() -> None:
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:1]), test=datasets.Dataset.from_list(ROWS + ROWS[2:])
    )
    probe = Probe.from_dataset(
        splits, word_tokenizer(), split="test", skip=5, num_sequences=2, min_length=1, name="later"
    )
    assert probe.fingerprint == Probe.from_texts(TEXTS[2:4], word_tokenizer(), min_length=1).fingerprint
    assert probe.source["skip"] == "5"
    assert probe.name == "later"
    with pytest.raises(ProbeError, match="expected split= to be one of train, test, got None"):
        Probe.from_dataset(splits, word_tokenizer())
    with pytest.raises(ProbeError, match="expected rows, got none after skip=9"):
        Probe.from_dataset(ROWS, word_tokenizer(), skip=9)


@pytest.mark.parametrize(
    ("dataset", "keywords", "error", "message"),
    [
        (ROWS, {"text_column": "body"}, ProbeError, "expected a column 'body', got the columns text, n. Name"),
        (ROWS, {"label_columns": ["a", "n"]}, ProbeError, "expected a column 'a', got the columns text, n"),
        ("", {}, ProbeError, "dataset: expected a file, a folder or a name on the hub, got an empty string"),
        (ROWS, {"label_columns": "n"}, ProbeError, "label_columns: expected a list of column names.*got str 'n'"),
        (ROWS, {"split": "test"}, ProbeError, "split=: expected only with a dataset on the hub, got list"),
        (ROWS, {"skip": -1}, ValueError, "skip: expected an integer of at least 0, got -1"),
        (ROWS, {"num_sequences": 0}, ValueError, "num_sequences: expected an integer of at least 1, got 0"),
        (
            ROWS,
            {"spilt": "test"},
            TypeError,
            "Probe.from_dataset: unexpected keyword spilt=. Expected .* split",
        ),
        (ROWS, {"text_column": "n"}, TypeError, "expected strings or lists of words in column 'n', got int in row 0"),
        ([], {}, ProbeError, "the list: expected rows, got none"),
        (TEXTS, {}, ProbeError, "the list: expected rows that are dicts, got str 'a b c d'"),
        ({"text": TEXTS}, {}, TypeError, "dataset: expected a datasets.Dataset.*got dict"),
        (5, {}, TypeError, "dataset: expected a datasets.Dataset.*got int"),
        (Path("nowhere"), {}, ProbeError, "got nowhere: no such file"),
        ("nowhere.jsonl", {}, ProbeError, "got nowhere.jsonl: no such file"),
        ("./nowhere", {}, ProbeError, "got ./nowhere: no such file"),
        (__file__, {}, ProbeError, r"expected a file that ends in \.json, .*got test_datasets\.py"),
    ],
)
def test_unusable_datasets_are_refused(
    dataset: Any, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Probe.from_dataset(dataset, word_tokenizer(), **keywords)


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ProbeError, match=r"rows\.jsonl: expected rows, got none"):
        Probe.from_dataset(tmp_path / "rows.jsonl", word_tokenizer(), **SETTINGS)


def test_a_transform_of_a_dataset_makes_its_rows(own_cache: Path) -> None:
    plain = datasets.Dataset.from_list([{"text": "a b c"}, {"text": "d e f"}])

    def probe(column: str, to: str) -> Probe:
        rows = plain.with_transform(lambda batch: {column: [text.replace("b", to) for text in batch["text"]]})
        return Probe.from_dataset(rows, word_tokenizer(), num_sequences=2, min_length=1, text_column=column)

    assert probe("text", "j").input_ids.tolist() == [[1, 3, 12, 5, 2], [1, 6, 7, 8, 2]]
    assert probe("body", "j").input_ids.tolist() == [[1, 3, 12, 5, 2], [1, 6, 7, 8, 2]]
    # Not the one from the cache.
    assert probe("text", "i").input_ids.tolist() == [[1, 3, 11, 5, 2], [1, 6, 7, 8, 2]]


def test_a_damaged_local_file_is_an_error(tmp_path: Path) -> None:
    path = compressed(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ProbeError, match=r"rows.json.gz: reading failed at the start \(EOFError"):
        Probe.from_dataset(path, word_tokenizer(), **SETTINGS)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("null\n", "null in line 1"),
        ('null {"text": "a b c d"}\n', "null .* in line 1"),
        ('\n{"text": "a b c d"}\nnull\n', "null in line 3"),
        ('{"text": "a b c d"}\n"a b"\n', '"a b" in line 2'),
        ("nonsense\n", "nonsense in line 1"),
        ('[\n  null,\n  {"text": "a b c d"}\n]\n', "a list that begins with null in line 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json.gz", "folder"])
def test_lines_that_are_no_objects_are_named(kind: str, content: str, found: str, tmp_path: Path) -> None:
    """By pyarrow's reader, null ends the process (a segmentation fault)."""
    path = tmp_path / kind / "rows.jsonl" if kind == "folder" else tmp_path / kind
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content.encode()) if kind.endswith(".gz") else content.encode())
    with pytest.raises(ProbeError, match=rf"{path.name}: expected one JSON object per line, .*, got {found}"):
        Probe.from_dataset(tmp_path / kind, word_tokenizer(), **SETTINGS)


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a b c d e",\n "n": [\n1,\nnull\n]\n}\n',
        '\ufeff{"text": "a b c d e"}\n\n',
        '[{"text": "a b c d e"},\n{"text": null}]',
        '["a b c d e",\n null]',
    ],
)
def test_other_ways_to_write_objects_in_json_are_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.warns(UserWarning, match="asked for 3 sequences, got 1"):
        probe = Probe.from_dataset(tmp_path / "rows.json", word_tokenizer(), **SETTINGS)
    assert (
        probe.input_ids.tolist()
        == Probe.from_texts(["a b c d e"], word_tokenizer(), min_length=4, max_length=6).input_ids.tolist()
    )


def test_a_file_whose_columns_change_their_kind_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, value in enumerate((1, {"a": [2]})):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": "a b c", "f": value}) + "\n")
    with pytest.raises(ProbeError, match=r"shards: reading failed after 1 rows \("):
        Probe.from_dataset(folder, word_tokenizer(), num_sequences=2, min_length=1, label_columns=["f"])


def test_what_is_no_tokenizer_or_name_is_refused_before_anything_is_read() -> None:
    def rows() -> Iterator[dict[str, str]]:
        raise AssertionError("read")
        yield {}

    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer"):
        Probe.from_dataset(rows(), str.split)
    with pytest.raises(ProbeError, match="name: expected a non-empty string, got 3"):
        Probe.from_dataset(rows(), word_tokenizer(), name=cast("str", 3))


def test_fewer_rows_than_asked_for_is_a_warning_also_from_the_cache(tmp_path: Path) -> None:
    path = json_lines(tmp_path)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="asked for 9 sequences, got 3: there were 5 texts, and 2 of them have fewer"
        ) as caught:
            Probe.from_dataset(path, word_tokenizer(), num_sequences=9, min_length=5)
        assert caught[0].filename == __file__


def test_a_bar_shows_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    Probe.from_dataset(ROWS, word_tokenizer(), progress=True, **SETTINGS)
    assert "probe 'dataset' of the list: 100%" in capsys.readouterr().err
    Probe.from_dataset(ROWS, word_tokenizer(), **SETTINGS)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- reading that fails


@pytest.mark.parametrize("error", [ConnectionError("lost"), EOFError("cut off"), pa.ArrowInvalid("cut off")])
def test_a_stream_that_breaks_off_is_an_error_and_no_shorter_probe(error: Exception) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ROWS[:4]
        raise error

    settings = SETTINGS | {"num_sequences": 4, "min_length": 1}
    assert len(Probe.from_dataset(rows(), word_tokenizer(), **settings)) == 4
    message = rf"the generator: reading failed after 4 rows \({type(error).__name__}: "
    with pytest.raises(ProbeError, match=message) as raised:
        Probe.from_dataset(rows(), word_tokenizer(), **settings | {"num_sequences": 5})
    # What a network has to do with it is said where it has.
    assert ("There is no network" in str(raised.value)) == isinstance(error, ConnectionError)


def test_reading_needs_datasets_and_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for dataset in (json_lines(tmp_path), "allenai/c4"):
        with pytest.raises(
            ImportError, match=r'Reading .* needs the package "datasets".*pip install "ib-callback\[hf\]"'
        ):
            Probe.from_dataset(dataset, word_tokenizer(), **SETTINGS)


# ---------------------------------------------------------------- the cache


def test_everything_that_decides_the_content_decides_the_file(tmp_path: Path, own_cache: Path) -> None:
    path = json_lines(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text(path.read_text())
    larger = word_tokenizer()
    larger.add_tokens(["z"])
    unlike = word_tokenizer()
    unlike.post_processor = None
    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
    left = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), truncation_side="left")
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (path, word_tokenizer(), {}),
        (other, word_tokenizer(), {}),
        (path, larger, {}),
        (path, unlike, {"min_length": 2}),
        (path, fast, {}),
        (path, left, {}),
        (path, word_tokenizer(), {"num_sequences": 2}),
        (path, word_tokenizer(), {"max_length": 5}),
        (path, word_tokenizer(), {"min_length": 5}),
        (path, word_tokenizer(), {"skip": 1}),
        (path, word_tokenizer(), {"label_columns": ["n"]}),
        (path, word_tokenizer(), {"label_columns": {"m": "n"}}),
        (path, word_tokenizer(), {"name": "other"}),
    ]
    for number, (dataset, tokenizer, keywords) in enumerate(calls, 1):
        first = Probe.from_dataset(dataset, tokenizer, **{**SETTINGS, **keywords})
        assert len(files_in(own_cache)) == number
        again = Probe.from_dataset(dataset, tokenizer, **{**SETTINGS, **keywords})
        assert len(files_in(own_cache)) == number
        assert again.fingerprint == first.fingerprint
        assert (again.name, again.source, again.label_names) == (first.name, first.source, first.label_names)
    os.utime(path, ns=(1, 1))  # a file that was written anew
    Probe.from_dataset(path, word_tokenizer(), **SETTINGS)
    assert len(files_in(own_cache)) == len(calls) + 1


def test_the_hash_of_a_tokenizer_is_of_what_it_does_not_of_its_settings() -> None:
    raw = word_tokenizer()
    before = tokenizer_hash(raw)
    raw.enable_truncation(3)
    raw.enable_padding(length=9)
    assert tokenizer_hash(raw) == before == tokenizer_hash(word_tokenizer())
    assert raw.truncation["max_length"] == 3
    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), name_or_path="one")
    assert tokenizer_hash(fast) == tokenizer_hash(
        PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), name_or_path="two", model_max_length=7)
    )
    slow = {tokenizer_hash(ByT5Tokenizer()), tokenizer_hash(ByT5Tokenizer(extra_ids=3))}
    assert len(slow | {before, tokenizer_hash(fast)}) == 4
    assert tokenizer_hash(ByT5Tokenizer()) in slow


def test_special_tokens_in_texts_taken_as_text_have_a_hash_of_their_own() -> None:
    def tokenizer() -> Any:
        inner = word_tokenizer()
        inner.add_special_tokens(["<|own|>"])
        return inner

    raw, split = tokenizer(), tokenizer()
    split.encode_special_tokens = True
    fast, fast_split = (
        PreTrainedTokenizerFast(tokenizer_object=tokenizer(), split_special_tokens=value) for value in (False, True)
    )
    assert raw.encode("a <|own|>").ids != split.encode("a <|own|>").ids
    for one, other in ((raw, split), (fast, fast_split)):
        before = tokenizer_hash(one)
        assert before != tokenizer_hash(other)
        one.encode("a")
        assert tokenizer_hash(one) == before


def test_a_tokenizer_that_draws_at_random_is_refused() -> None:
    dropping = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5))
    for tokenizer in (dropping, PreTrainedTokenizerFast(tokenizer_object=dropping)):
        with pytest.raises(ProbeError, match=r"the same ids each time, got one with dropout=0\.5"):
            Probe.from_texts(["ab ab"], tokenizer, min_length=1)


def test_a_place_for_the_cache_and_none(tmp_path: Path, own_cache: Path) -> None:
    path = json_lines(tmp_path)
    Probe.from_dataset(path, word_tokenizer(), cache=False, **SETTINGS)
    Probe.from_dataset(path, word_tokenizer(), cache_dir=tmp_path / "here", **SETTINGS)
    assert not own_cache.exists()
    (file,) = files_in(tmp_path / "here")
    assert Probe.load(file).fingerprint == expected().fingerprint


def test_without_a_home_a_probe_is_built_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = json_lines(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.warns(RuntimeWarning, match=r"it cannot be cached because this user has no home directory.*cache_dir="):
        probe = Probe.from_dataset(str(path), word_tokenizer(), **SETTINGS)
    assert probe.fingerprint == expected().fingerprint


@pytest.mark.parametrize("streamed", [False, True], ids=["Column", "IterableColumn"])
@pytest.mark.parametrize("constructor", [Probe.from_dataset, Probe.from_preferences])
def test_a_column_of_a_dataset_is_refused_with_what_to_pass_instead(constructor: Any, streamed: bool) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    column = dataset.to_iterable_dataset()["text"] if streamed else dataset["text"]
    with pytest.raises(
        TypeError, match=r"got (Iterable)?Column, which is one column.*text_column=.*Probe\.from_texts\("
    ):
        constructor(column, word_tokenizer())


def test_the_cache_needs_safetensors_and_says_so_before_it_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = json_lines(tmp_path)
    with pytest.raises(
        ImportError, match=r"Keeping a probe in the cache, which cache=False turns off, needs the package"
    ):
        Probe.from_dataset(path, word_tokenizer(), **SETTINGS)
    assert Probe.from_dataset(path, word_tokenizer(), cache=False, **SETTINGS).fingerprint == expected().fingerprint


def test_a_damaged_file_of_the_cache_is_built_anew(tmp_path: Path, own_cache: Path) -> None:
    path = json_lines(tmp_path)
    Probe.from_dataset(path, word_tokenizer(), **SETTINGS)
    (file,) = files_in(own_cache)
    content = file.read_bytes()
    flipped, renamed = content[:-1] + bytes([content[-1] ^ 1]), content.replace(b"rows.jsonl", b"cows.jsonl")
    for damaged in (content[:-1], flipped, renamed, b""):
        file.write_bytes(damaged)
        with pytest.warns(RuntimeWarning, match=r"probe 'rows.jsonl' of .* is damaged or cannot be read"):
            probe = Probe.from_dataset(str(path), word_tokenizer(), **SETTINGS)
        assert probe.fingerprint == expected().fingerprint
        assert Probe.load(file).fingerprint == probe.fingerprint


BUILD = """
import sys, time
from pathlib import Path
from tokenizers import Tokenizer
from ib_callback import Probe
from ib_callback.probe import _datasets

collect = _datasets.collect
def slow(*arguments, **keywords):
    with open(sys.argv[3], "a") as log:
        log.write("built\\n")
    print("building", flush=True)
    time.sleep(float(sys.argv[4]))
    return collect(*arguments, **keywords)
_datasets.collect = slow
probe = Probe.from_dataset(sys.argv[2], Tokenizer.from_file(sys.argv[1]), num_sequences=3, min_length=4, max_length=6)
print(probe.fingerprint)
"""


def test_processes_that_build_the_same_and_one_that_is_killed(tmp_path: Path, own_cache: Path) -> None:
    path, log = json_lines(tmp_path), tmp_path / "log"
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))

    def start(seconds: float) -> subprocess.Popen:
        arguments = [tmp_path / "tokenizer.json", path, log, seconds]
        return subprocess.Popen(
            [sys.executable, "-c", BUILD, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start(600) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "building\n"
        others = [start(0.5), start(0.5)]
        killed.kill()
    said = [process.communicate() for process in others]
    assert [process.returncode for process in others] == [0, 0], said
    assert [out.split()[-1] for out, _ in said] == [expected().fingerprint] * 2
    assert log.read_text() == "built\n" * 2  # by the one that was killed and by one of the others
    (file,) = files_in(own_cache)
    assert Probe.load(file).fingerprint == expected().fingerprint
    assert {p.name for p in own_cache.iterdir()} == {file.name, f".{file.name}.lock"}


# ---------------------------------------------------------------- ids and memory


def test_ids_are_those_that_the_tokenizer_gives_to_one_text_after_another() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), n)) for n in rng.integers(1, 30, 40)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer())
    rows = [tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in texts]
    rows = [row for row in rows if len(row) >= 8][:17]
    for kind in (tokenizer, word_tokenizer()):
        probe = Probe.from_texts(texts, kind, num_sequences=17, max_length=20, min_length=8)
        assert [ids[mask].tolist() for ids, mask in zip(probe.input_ids, probe.attention_mask, strict=True)] == rows


def test_memory_does_not_grow_with_the_dataset() -> None:
    def peak(num_rows: int) -> int:
        """Bytes held at most while 100 sequences are taken from so many rows."""
        rows = ({"text": "a b c d e f g h " * (9 if row % (num_rows // 100) == 0 else 1)} for row in range(num_rows))
        tracemalloc.start()
        probe = Probe.from_dataset(rows, word_tokenizer(), num_sequences=100, max_length=64, min_length=64)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(probe), probe.source["texts_read"]) == (100, str(num_rows - num_rows // 100 + 1))
        return highest

    peak(100)  # what the first call imports and keeps
    assert peak(5000) < 1.2 * peak(500)


def test_of_a_server_that_is_gone_it_is_said_soon_and_nobody_elses_settings_are_changed() -> None:
    config = SimpleNamespace(STREAMING_READ_MAX_RETRIES=20, STREAMING_OPEN_MAX_RETRIES=1)
    seen = []

    def rows() -> Iterator[int]:
        for number in range(2):
            seen.append((config.STREAMING_READ_MAX_RETRIES, config.STREAMING_OPEN_MAX_RETRIES))
            yield number

    for _ in _rows._streamed(rows(), config):
        assert config.STREAMING_READ_MAX_RETRIES == 20
    assert seen == [(2, 1), (2, 1)]
    assert config.STREAMING_READ_MAX_RETRIES == 20
