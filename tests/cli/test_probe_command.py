"""`ib-callback probe`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback import Probe
from ib_callback.cli import main

WORDS = "a b c d e f g h i j"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    PreTrainedTokenizerFast(tokenizer_object=word_tokenizer()).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    (tmp_path / "damaged" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    rows = [{"text": f"{letter} {WORDS}", "kind": kind} for letter, kind in zip("abcd", "xyxy", strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": WORDS, "chosen": f"a {WORDS}", "rejected": f"b {WORDS}"}] * 2 + [
        {"chosen": "a", "rejected": "a"}
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def build(*options: str) -> int:
    return main.main(["probe", "build", "--tokenizer", "tokenizer", *options])


def test_a_probe_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--dataset rows.jsonl --num-sequences 3 --max-length 12 --min-length 4 --label-column kind -o out/p.safetensors"
    )
    assert build(*options.split(), "--skip", "1", "--name", "mine") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("out/p.safetensors: Probe('mine', 3 sequences of up to 12 tokens, labels kind, ")
    assert printed.err == ""
    probe = Probe.load("out/p.safetensors")
    expected = Probe.from_texts(
        [f"{letter} {WORDS}" for letter in "bcd"],
        word_tokenizer(),
        max_length=12,
        min_length=4,
        labels={"kind": "y x y".split()},
    )
    assert probe.fingerprint == expected.fingerprint
    assert probe.label_names == {"kind": ("x", "y")}
    assert len(list((folder / "cache").rglob("*.safetensors"))) == 1


def test_a_probe_of_pairs_says_what_was_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--dataset pairs.jsonl --preferences --num-sequences 4 -o p.safetensors --no-cache"
    assert build(*options.split()) == 0
    assert Probe.load("p.safetensors").label_names == {"preference": ("rejected", "preferred")}
    assert not (folder / "cache").exists()
    assert build(*options.replace("4", "6").split()) == 0
    error = capsys.readouterr().err
    assert (
        "ib-callback: asked for 6 sequences, got 4: there were 3 pairs; left out 1 of 3 pairs: 1 with equal texts"
        in error
    )


def test_a_bare_tokenizer_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", "rows.jsonl", "--num-sequences", "4", "--min-length", "1", "-o", "p.safetensors"]
    assert main.main(["probe", "build", "--tokenizer", "tokenizer/tokenizer.json", *options]) == 0
    assert "a bare tokenizer.json" in capsys.readouterr().err
    assert Probe.load("p.safetensors").tokenizer == "tokenizers.Tokenizer, 13 entries"


def test_known_names_reach_their_constructors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, dict[str, object]]] = []

    def constructor(name: str) -> object:
        def make(tokenizer: object, **keywords: object) -> Probe:
            assert (tokenizer is None) == (name == "builtin")
            given.append((name, keywords))
            return Probe.from_tokens([[1]])

        return make

    for name in ("from_c4", "from_tulu", "builtin"):
        monkeypatch.setattr(Probe, name, constructor(name))
    common = ["--num-sequences", "8", "--max-length", "64", "-o", "p.safetensors"]
    assert build("--dataset", "c4", *common, "--revision", "abc") == 0
    assert build("--dataset", "tulu", *common, "--skip", "5", "--no-cache") == 0
    assert main.main(["probe", "build", "--dataset", "builtin", "--tokenizer", "-", *common]) == 0
    sizes = {"num_sequences": 8, "max_length": 64}
    assert given == [
        ("from_c4", sizes | {"revision": "abc"}),
        ("from_tulu", sizes | {"skip": 5, "cache": False}),
        ("builtin", sizes),
    ]


@pytest.mark.parametrize("spelling", [["show"], ["--show"]])
def test_show(spelling: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = {"language": [[0] * 10, [1] * 10], "pos": [[1, 2] * 5, [3] * 10]}
    probe = Probe.from_tokens(
        [[7] * 10, [*range(9), 0]], [[1] * 10, [1] * 9 + [0]], labels=labels, label_names={"language": ["de", "en"]}
    )
    probe.save("p.safetensors")
    assert main.main(["probe", *spelling, "p.safetensors", "--layers", "3", "--bins", "50"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "probe 'tokens': 2 sequences, 19 tokens, 9 to 10 per sequence (median 9)",
        f"fingerprint {probe.fingerprint}",
        f"{'tokenizer':<20} not known",
        f"{'constructor':<20} from_tokens",
        "5 valid positions, with 4 tokens on either side:",
        "feature language, permuted by whole sequences:",
        "feature pos, labels vary within sequences: permuted over positions:",
    ):
        assert line in printed.splitlines()
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in printed.splitlines() if len(line.split()) == 6}
    # Of five positions three carry 7, before and after; the other two carry labels of their own.
    assert rows["token", "before"][:3] == ["3", "2", "40.0%"]
    assert rows["quadgram", "after"][:3] == ["3", "2", "40.0%"]
    assert "de 1 sequences 3 valid positions" in " ".join(printed.split())
    assert "for 3 layers, 50 bins and batches of 8" in printed


def test_convert_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 6), generator=generator)
    mask = [[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]  # the last column is padding throughout
    labels = {"f": torch.randint(-1, 2, (3, 6), generator=generator)}
    probe = Probe.from_tokens(ids, mask, labels=labels, label_names={"f": ["ä", "b"]}, name="näme", groups=[4, 2, 4])
    probe.save("p.safetensors")
    assert main.main("probe convert p.safetensors p.jsonl".split()) == 0
    assert main.main("probe convert p.jsonl q.safetensors".split()) == 0
    assert capsys.readouterr().out == "p.jsonl\nq.safetensors\n"
    again = Probe.load("q.safetensors")
    assert again.fingerprint == probe.fingerprint
    assert (again.name, again.source, again.label_names) == (probe.name, probe.source, probe.label_names)
    assert again.groups == probe.groups == (0, 1, 0)
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert lines[2] == {"input_ids": ids[1, :2].tolist(), "labels": {"f": probe.labels["f"][1, :2].tolist()}}


def test_lines_made_by_hand(folder: Path) -> None:
    Path("hand.jsonl").write_text('{"input_ids": [3, 4], "labels": {"f": [0, 1]}}\n\n{"input_ids": [5]}\n')
    assert main.main("probe convert hand.jsonl p.safetensors".split()) == 0
    probe = Probe.load("p.safetensors")
    assert probe.name == "hand"
    assert probe.input_ids.tolist() == [[3, 4], [5, 0]]
    assert probe.labels["f"].tolist() == [[0, 1], [-1, -1]]


LINES = {
    "not json": ('{"input_ids": [1]}\n{\n', "bad.jsonl:2: expected one JSON object per line"),
    "no ids": ('{"ids": [1]}\n', 'where only input_ids is required, got {"ids": [1]}'),
    "nothing": ("\n", "expected at least one line with input_ids"),
    "fractions": (
        '{"input_ids": [1.5]}\n',
        "bad.jsonl: its content is not a probe: input_ids: expected an integer",
    ),
    "labels": (
        '{"input_ids": [1, 2], "labels": {"f": [1, 2, 3]}}\n',
        'bad.jsonl:1: expected {"input_ids": [ids], "labels": {name: [as many]}',
    ),
    **{
        f"one label for many ids, {kind}": (
            f'{{"input_ids": [1, 2], "labels": {{"f": {label}}}}}\n',
            'bad.jsonl:1: expected {"input_ids": [ids], "labels": {name: [as many]}',
        )
        for kind, label in {"alone": 1, "in a list": "[1]", "a word": '"ab"', "none": "null"}.items()
    },
    "one label for each list of ids": (
        '{"input_ids": [[1, 2], [3, 4]], "labels": {"f": [0, 1]}}\n',
        "bad.jsonl: its content is not a probe: input_ids: expected [N, S]",
    ),
    "a list of labels for each id": (
        '{"input_ids": [1, 2], "labels": {"f": [[0], [1]]}}\n',
        "bad.jsonl: its content is not a probe: labels['f']: expected [N, S] = [1, 2] like input_ids",
    ),
    "labels without a name": (
        '{"input_ids": [1], "labels": [1]}\n',
        '"labels": {name: [as many]}, "padding": 0 or more}',
    ),
    "padding": ('{"input_ids": [1], "padding": -1}\n', '"padding": 0 or more}, where only input_ids'),
    "nested too deep": (
        "[" * 100_000 + "\n",
        "bad.jsonl:1: expected one JSON object per line (its brackets are nested",
    ),
    "padding beyond all memory": (
        '{"input_ids": [1], "padding": 1000000000000000}\n',
        "bad.jsonl: its content is not a probe: length and padding: expected at most 134,217,728 positions",
    ),
    "a length of no integer": (
        '{"probe": {"length": 1e999}}\n{"input_ids": [1]}\n',
        "bad.jsonl: its content is not a probe: length: expected an integer, got inf",
    ),
    "changed": (
        '{"probe": {"fingerprint": "00"}}\n{"input_ids": [1]}\n',
        "its lines were changed: expected fingerprint 00",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_lines_that_are_no_probe(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = LINES[case]
    Path("bad.jsonl").write_text(content)
    assert main.main("probe convert bad.jsonl p.safetensors".split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("probe show nowhere.safetensors", "nowhere.safetensors: this probe file does not exist"),
        ("probe --show rows.jsonl", "rows.jsonl: cannot be loaded as a probe"),
        ("probe convert rows.jsonl p.txt", "expected IN and OUT to be a .safetensors and a .jsonl file"),
        ("probe build --dataset nowhere.jsonl --tokenizer tokenizer -o p", "got nowhere.jsonl: no such file"),
        ("probe build --dataset rows.jsonl --tokenizer tokenizer -o p --num-sequences 0", "num_sequences: expected"),
        (
            "probe build --dataset rows.jsonl --tokenizer tokenizer -o p --split x",
            "split=: expected only with a dataset on",
        ),
        ("probe build --dataset c4 --tokenizer tokenizer -o p", "allenai/c4: reading failed at the start"),
        ("probe build --dataset rows.jsonl --tokenizer nobody/nothing -o p", "nobody/nothing"),
        ("probe build --dataset rows.jsonl --tokenizer damaged -o p", "--tokenizer damaged: cannot be loaded"),
        ("probe build --dataset rows.jsonl --tokenizer rows.jsonl -o p", "expected a tokenizer.json, got another file"),
        ("probe build --dataset rows.jsonl --tokenizer none.json -o p", "--tokenizer none.json: expected a file"),
        ("probe build --dataset rows.jsonl --tokenizer - -o p", "--tokenizer -: cannot be loaded"),
        ("probe build --dataset rows.jsonl --tokenizer tokenizer -o p.jsonl", "-o: expected a .safetensors file"),
        (
            "probe build --dataset rows.jsonl --tokenizer tokenizer -o tokenizer",
            "-o: expected a .safetensors file, got tokenizer",
        ),
        (
            "probe build --dataset c4 --tokenizer tokenizer -o p --name n --label-column l",
            "Probe.from_c4: unexpected keyword label_columns=",
        ),
        (
            "probe build --dataset builtin --tokenizer - -o p --skip 3 --no-cache",
            "Probe.builtin() got an unexpected keyword argument 'skip'",
        ),
        (
            "probe build --dataset pairs.jsonl --preferences --min-length 3 --tokenizer tokenizer -o p",
            "Probe.from_preferences: unexpected keyword min_length=",
        ),
    ],
)
def test_a_mistake_is_one_line(command: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("ib-callback: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("p").exists()


def test_probe_alone_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["probe"]) == 2
    assert "build|show|convert" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main.main(["probe", "show", "p", "--layers", "0"])
    assert "expected 1 or more, got 0" in capsys.readouterr().err
