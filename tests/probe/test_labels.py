"""Labels of rows, words and spans: to numbers by token, and their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import ByT5Tokenizer
from word_tokenizer import word_tokenizer

from ib_callback import Probe, ProbeError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def test_labels_of_rows_as_integers_strings_and_partly_missing() -> None:
    rows = [
        {"text": "a b c", "language": "fr", "domain": 2, "good": True},
        {"text": "skip", "language": "xx", "domain": 9, "good": None},
        {"text": "d e", "language": None, "domain": -1, "good": False},
        {"text": "f g h", "language": "de", "domain": None, "good": np.bool_(True)},
    ]
    columns = {"tongue": "language", "domain": "domain", "good": "good"}
    with pytest.warns(UserWarning, match=r"'domain' \(all 2\)"):
        probe = Probe.from_dataset(rows, word_tokenizer(), min_length=4, num_sequences=None, label_columns=columns)
    # The alphabet decides, of the names that are in the probe.
    assert probe.label_names == {"tongue": ("de", "fr")}
    assert probe.labels["tongue"].tolist() == [[1] * 5, [-1] * 5, [0] * 5]
    assert probe.labels["domain"].tolist() == [[2] * 5, [-1] * 5, [-1] * 5]
    assert probe.labels["good"].tolist() == [[1] * 5, [0, 0, 0, 0, -1], [1] * 5]


def test_missing_integers_as_pandas_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,f\na b c,2\nd e f,\ng h i,0\n")
    columns: dict[str, Any] = {"label_columns": ["f"], "num_sequences": 3, "min_length": 1}
    assert Probe.from_dataset(path, word_tokenizer(), **columns).labels["f"][:, 0].tolist() == [2, -1, 0]
    rows = [{"text": "a", "f": value} for value in (np.float32(2), float("nan"), 0.0)]
    assert Probe.from_dataset(rows, word_tokenizer(), **columns).labels["f"][:, 0].tolist() == [2, -1, 0]


def test_a_sorted_dataset_whose_first_rows_have_one_label_is_a_warning() -> None:
    rows = [{"text": "a b c", "f": label, "g": None} for label in ("x", "x", "y")]
    columns: dict[str, Any] = {"min_length": 1, "label_columns": ["f", "g"]}
    with pytest.warns(
        UserWarning, match=r"a single label.*: 'f' \(all 'x'\), 'g' \(all without a label\). .*shuffle"
    ) as caught:
        Probe.from_dataset(rows, word_tokenizer(), num_sequences=2, **columns)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"the whole probe has a single label: 'g' \(all without a label\)\. "):
        Probe.from_dataset(rows, word_tokenizer(), num_sequences=3, **columns)


def test_numbers_of_names_do_not_depend_on_the_order_of_rows() -> None:
    names = ["c", "a", "b", "a"]
    rows = [{"text": "a b", "f": name} for name in names]
    settings: dict[str, Any] = {"label_columns": ["f"], "min_length": 1, "num_sequences": None}
    one = Probe.from_dataset(rows, word_tokenizer(), **settings)
    other = Probe.from_dataset(rows[::-1], word_tokenizer(), **settings)
    assert one.label_names == other.label_names == {"f": ("a", "b", "c")}
    assert one.labels["f"][:, 0].tolist() == [2, 0, 1, 0] == other.labels["f"][:, 0].tolist()[::-1]


def test_labels_of_spans_and_where_they_meet_tokens() -> None:
    #       0123456789
    text = "a b  c d e"
    spans = [
        [(0, 3, "noun"), {"start": 5, "end": 6, "label": "verb"}, (9, 99, "noun")],
        {"start": [0, 0], "end": [10, 1], "label": ["all", "first"]},
        [],
        None,
        [(3, 5, "space"), (7, 8, None)],
    ]
    rows = [{"text": text, "pos": span} for span in spans]
    probe = Probe.from_dataset(
        rows, word_tokenizer(), label_columns=["pos"], num_sequences=5, min_length=1, max_length=6
    )
    names = ("all", "first", "noun", "verb")
    assert probe.label_names == {"pos": names}
    read = [[names[i] if i >= 0 else "-" for i in row] for row in probe.labels["pos"].tolist()]
    # [CLS] a b c d, and [SEP] for what was cut
    assert read == [
        "- noun noun verb - -".split(),
        "- first all all all -".split(),
        ["-"] * 6,
        ["-"] * 6,
        ["-"] * 6,
    ]


def test_labels_of_words_with_class_names() -> None:
    features = datasets.Features(
        tokens=datasets.List(datasets.Value("string")),
        upos=datasets.List(datasets.ClassLabel(names=["NOUN", "VERB", "ADJ"])),
        topic=datasets.ClassLabel(names=["x", "y"]),
    )
    rows = {"tokens": [["a", "b b", "c"], ["d", "e"]], "upos": [[1, 0, -1], [0, 0]], "topic": [1, 0]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    probe = Probe.from_dataset(
        dataset, word_tokenizer(), text_column="tokens", label_columns=["upos", "topic"], min_length=1, num_sequences=2
    )
    assert probe.input_ids.tolist() == [[1, 3, 4, 4, 5, 2], [1, 6, 7, 2, 0, 0]]
    assert probe.label_names == {"upos": ("NOUN", "VERB", "ADJ"), "topic": ("x", "y")}
    assert probe.labels["upos"].tolist() == [[-1, 1, 0, 0, -1, -1], [-1, 0, 0, -1, -1, -1]]
    assert probe.labels["topic"].tolist() == [[1] * 6, [0, 0, 0, 0, -1, -1]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "f": 1.5}],
            "expected integers from 0 on, .*or spans .*got float 1.5 at index 0",
        ),
        ([{"text": "a", "f": 2**63}], "expected integers .*got int 9223372036854775808 at index 0"),
        ([{"text": "a", "f": float("inf")}], "got float inf at index 0"),
        ([{"text": "a", "f": {"start": [0], "end": [1, 2], "label": [3]}}], "expected integers .*got dict"),
        ([{"text": "a", "f": "x"}, {"text": "a", "f": 1}], "got 1 at index 1 after strings"),
        ([{"text": "a", "f": [0]}], r"spans \(start, end, label\).*got int 0 at index 0.*lists of words"),
        ([{"text": "a", "f": [(2, 1, "x")]}], r"with 0 <= start <= end, got tuple \(2, 1, 'x'\)"),
        ([{"text": "a", "f": [("0", 1, "x")]}], r"got tuple \('0', 1, 'x'\) at index 0"),
        ([{"text": ["a", "b"], "f": [1]}], "expected 2 labels, one for each word, got 1 at index 0"),
        ([{"text": "a", "f": {"label": 1}}], "got dict"),
    ],
)
def test_unusable_labels_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_dataset(rows, word_tokenizer(), label_columns=["f"], min_length=1)


def test_spans_need_a_tokenizer_that_knows_places() -> None:
    with pytest.raises(ProbeError, match=r"says where in the text each token is, got ByT5Tokenizer\. Use a fast"):
        Probe.from_dataset([{"text": "a", "f": [(0, 1, 1)]}], ByT5Tokenizer(), label_columns=["f"], min_length=1)


def test_texts_take_spans_too() -> None:
    probe = Probe.from_texts(["a b", "c"], word_tokenizer(), min_length=1, labels={"f": [[(2, 3, "x")], "y"]})
    assert probe.labels["f"].tolist() == [[-1, -1, 0, -1], [1, 1, 1, -1]]
    assert probe.label_names == {"f": ("x", "y")}
