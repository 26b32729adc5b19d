"""The built-in text: English prose, the same wherever it is read, and nothing held out is trained on."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from tokenizers import Tokenizer

from ib_callback import Probe, ProbeError
from ib_callback.probe import _docstrings, builtin_text
from ib_callback.probe._prose import paragraphs

ROOT = Path(builtin_text.__file__).parents[2]


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z]+", " ", text.lower()).split()


# ---------------------------------------------------------------- kept on the disk


def test_what_was_read_once_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builds = []

    def _text() -> tuple[tuple[str, ...], ...]:
        builds.append(1)
        return (("one", "two"), ("three",))

    for _ in range(2):  # as in two processes
        assert builtin_text._kept(_text)() == (("one", "two"), ("three",))
    assert len(builds) == 1

    [file] = (tmp_path / "ib_callback" / "builtin_text").glob("text-*.json")
    file.write_bytes(file.read_bytes().replace(b"two", b"six"))
    with pytest.warns(RuntimeWarning, match="built-in text: .* is damaged"):
        assert builtin_text._kept(_text)() == (("one", "two"), ("three",))
    assert len(builds) == 2


def test_an_installation_of_other_versions_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = builtin_text._installation.__wrapped__()
    monkeypatch.setattr(np, "__version__", "0.0.0")
    assert builtin_text._installation.__wrapped__() != before


# ---------------------------------------------------------------- the corpus


def test_there_is_enough_to_train_on_and_to_measure_on() -> None:
    training, held_out = builtin_text.split()
    assert sum(map(len, training)) > 3_000_000
    assert len(held_out) == 512
    assert min(map(len, builtin_text.documents())) >= 800
    assert len(training) > 1000


def test_every_held_out_document_is_whole() -> None:
    assert set(builtin_text.split()[1]) <= set(builtin_text.documents())


def test_held_out_text_is_not_in_the_training_text() -> None:
    training, held_out = builtin_text.split()
    training_paragraphs = {" ".join(words(part)) for text in training for part in text.split("\n\n")}
    held_out_paragraphs = {" ".join(words(part)) for text in held_out for part in text.split("\n\n")}
    assert len(held_out_paragraphs) > 2000
    assert training_paragraphs.isdisjoint(held_out_paragraphs)
    runs: tuple[set[str], set[str]] = (set(), set())
    for found, parts in zip(runs, (training_paragraphs, held_out_paragraphs), strict=True):
        for part in parts:
            listed = part.split()
            found.update(" ".join(listed[i : i + 8]) for i in range(len(listed) - 7))
    assert len(runs[1]) > 50_000
    assert runs[0].isdisjoint(runs[1])


def test_no_paragraph_occurs_twice() -> None:
    parts = [" ".join(words(part)) for text in builtin_text.documents() for part in text.split("\n\n")]
    assert len(parts) == len(set(parts))


def test_it_reads_as_english() -> None:
    common = set("the of to a and is in be for that it as are or not this with if by on from an which can".split())
    held_out = builtin_text.split()[1]
    for text in held_out:
        found = words(text)
        assert sum(word in common for word in found) > 0.15 * len(found), text
        assert sum(map(str.isalpha, text)) > 0.6 * len(text), text
        assert not re.search(r">>>|::|\\|https?:|\n\n\n", text), text


def test_reading_leaves_the_garbage_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def modules() -> list[list[list[str]]]:
        states.append(gc.isenabled())
        return []

    monkeypatch.setattr(builtin_text, "modules", modules)
    assert gc.isenabled()
    assert builtin_text._documents.__wrapped__() == ()
    assert states == [False]
    assert gc.isenabled()


def test_an_installation_without_source_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_text, "_documents", lambda: ())
    with pytest.raises(ProbeError, match=r"built-in text: .*got 0 documents.*Probe.from_texts"):
        builtin_text._split.__wrapped__()


def test_long_texts_are_cut_between_paragraphs() -> None:
    sentence = "This is one of many sentences about nothing in particular, to be cut into documents. "
    parts = [f"{i} {sentence * (1 + i % 7)}" for i in range(60)] + [sentence * 200, "the end " * 10]
    pieces = builtin_text._pieces(parts)
    assert [part for piece in pieces for part in piece] == parts
    assert len(pieces) > 3
    assert all(sum(map(len, piece)) >= 800 for piece in pieces)
    assert builtin_text._pieces(["short"]) == [["short"]]


# ---------------------------------------------------------------- reading source files


def test_source_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/z.py",
        "a/tests/x.py",
        "a.py",
        "site-packages/p/m.py",
        "pydoc_data/topics.py",
        "c.txt",
        "a/B.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [path.relative_to(tmp_path).as_posix() for path in _docstrings._source_files(tmp_path)]
    assert found == ["a/B.py", "a/z.py", "a.py", "b.py"]


def test_a_module_is_read_without_being_imported(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    filler = "word " * 200
    path.write_text(
        f'''"""Module. {filler}"""
raise SystemExit("imported")
class A:
    """Class."""
    def f(self):
        r"""Method \\d."""
        def inner():
            """Inner."""
    x = """not a docstring"""
async def g():
    """Function."""
add_docstr(g, r"""Call
of two lines.""".format(a="b"))
'''
    )
    module, klass, function, call = _docstrings._module_texts(path)
    assert [text.strip() for text in module] == [f"Module. {filler}".strip()]
    assert klass == ["Class.", "Method \\d.", "Inner."]
    assert function == ["Function."]
    assert call == ["Call\nof two lines."]


@pytest.mark.parametrize("content", ["def f(:\n", "x = 1\n", ""])
def test_unreadable_and_silent_files_give_nothing(content: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(content + '"""' + "word " * 500 + '"""' if content.startswith("def") else content)
    assert _docstrings._module_texts(path) == []


def test_topics_of_pydoc_may_be_missing(tmp_path: Path) -> None:
    assert _docstrings._topics(tmp_path) == []
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'a': 'one '\n 'text', 'b': r'''two\ntexts'''}\n")
    assert _docstrings._topics(tmp_path) == [["one text"], ["two\ntexts"]]


# ---------------------------------------------------------------- docstrings to prose


def test_prose_of_a_numpy_docstring() -> None:
    docstring = r"""
    Sum.

    The sum of the elements is taken over *all* of the axes, as in :func:`~numpy.add` or ``add``,
    if you do not say which [1]_.

    Parameters
    ----------
    a : array_like
        The array that is to be summed, of which the
        elements must be numbers.
    axis, axes : int or None, optional
        The axis or axes along which the sum is to be taken.

    Returns
    -------
    ndarray
        A new array with the sums that were asked for.

    See Also
    --------
    mean : The mean of the elements of an array, along the axis that is given.

    Notes
    -----
    .. note:: This is slow if the array is not contiguous in memory.

    .. math:: s = \sum_i a_i \text{ where the sum is over all of the elements of the array}

    The elements can be summed in any order, for example::

        the code of the example is left out of the prose of the text

    * The first of the items is that you should not use it for this.
    * The second of the items is that
      it goes on in the next line.

    ===== ==========================================
    a     the table is not a part of the prose at all
    ===== ==========================================

    Examples
    --------
    >>> the_sum_of_the_elements = total(a)
    the output of the example is not to be read as prose

    """
    assert paragraphs(docstring) == [
        "The sum of the elements is taken over all of the axes, as in add or add, if you do not say which.",
        "The array that is to be summed, of which the elements must be numbers.",
        "The axis or axes along which the sum is to be taken.",
        "A new array with the sums that were asked for.",
        "This is slow if the array is not contiguous in memory.",
        "The elements can be summed in any order, for example:",
        "The first of the items is that you should not use it for this.",
        "The second of the items is that it goes on in the next line.",
    ]


def test_prose_of_a_google_docstring() -> None:
    docstring = """Apply it to the input, which may be of any size that you like.

    Args:
        input (Tensor, optional): the input that it is to be applied to,
            with as many dimensions as there are.
        dim: the dimension along which it is to be applied.

    :param out: the tensor that the result is to be written to.
    """
    assert paragraphs(docstring) == [
        "Apply it to the input, which may be of any size that you like.",
        "the input that it is to be applied to, with as many dimensions as there are.",
        "the dimension along which it is to be applied.",
        "the tensor that the result is to be written to.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "Der Wert ist die Summe aller Elemente, die in dem Feld enthalten sind, und nichts sonst.",
        "int float bool str bytes list tuple dict set frozenset complex range slice object",
        "If a_b[i] == c_d(x) and e.f is None: return self.g(h=1) or else {y} in (0, 1]",
        "The value of {name} is to be put in the place of it by the one who uses it.",
        r"The norm is \|x\| if it is the one that is to be used for all of the values.",
    ],
)
def test_what_is_not_prose(text: str) -> None:
    assert paragraphs(text) == []


# ---------------------------------------------------------------- tokenizer and probe


def test_tokenizer_encodes_anything_and_back() -> None:
    tokenizer = builtin_text.train_tokenizer(["the cat sat on the mat " * 20], vocab_size=260)
    assert tokenizer.get_vocab_size() == 260
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    text = "the über-cat 猫 sat\n\ton \x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the cat sat").ids) < len("the cat sat")


def test_tokenizer_too_small_for_the_bytes() -> None:
    with pytest.raises(ValueError, match=r"at least 257.*got 256"):
        builtin_text.train_tokenizer(["text"], vocab_size=256)


def test_default_tokenizer_is_not_shared() -> None:
    first = builtin_text.default_tokenizer()
    first.enable_truncation(2)
    assert builtin_text.default_tokenizer().truncation is None
    assert first.get_vocab_size() == 4096


def test_builtin_probe_has_full_sequences_and_says_where_they_are_from() -> None:
    probe = Probe.builtin()
    assert probe.input_ids.shape == (256, 128)
    assert probe.attention_mask.all()
    assert probe.input_ids.max() < 4096
    assert probe.name == "builtin"
    assert probe.source["python"] == ".".join(map(str, sys.version_info[:3]))
    assert probe.source["numpy"] == np.__version__
    assert probe.source["scipy"] == scipy.__version__
    assert probe.source["torch"] == torch.__version__
    assert probe.source["corpus_fingerprint"] == builtin_text.corpus_fingerprint()
    text = builtin_text.default_tokenizer().decode(probe.input_ids[3].tolist())
    assert builtin_text.split()[1][3].startswith(text)


def test_builtin_probe_with_another_tokenizer_and_length() -> None:
    tokenizer = builtin_text.train_tokenizer(["the cat sat on the mat"], vocab_size=257)
    probe = Probe.builtin(tokenizer, num_sequences=3, max_length=10)
    held_out = builtin_text.split()[1]
    assert [tokenizer.decode(ids) for ids in probe.input_ids.tolist()] == [text[:10] for text in held_out[:3]]
    assert probe.tokenizer == "tokenizers.Tokenizer, 257 entries"


def test_more_sequences_than_there_are_warns() -> None:
    with pytest.warns(UserWarning, match="asked for 1000 sequences, got 512") as caught:
        probe = Probe.builtin(num_sequences=1000)
    assert len(probe) == 512
    assert caught[0].filename == __file__


def test_another_process_makes_the_same_of_it(tmp_path: Path) -> None:
    # Another hash seed, locale, directory and number of threads than here.
    code = (
        "import hashlib, json\n"
        "from ib_callback import Probe\nfrom ib_callback.probe import builtin_text\n"
        "tokenizer = builtin_text.default_tokenizer().to_str()\n"
        "print(json.dumps([builtin_text.corpus_fingerprint(), hashlib.sha256(tokenizer.encode()).hexdigest(),"
        " Probe.builtin().fingerprint]))"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C",
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": "3",
    }
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    tokenizer = builtin_text.default_tokenizer().to_str()
    assert json.loads(run.stdout) == [
        builtin_text.corpus_fingerprint(),
        hashlib.sha256(tokenizer.encode()).hexdigest(),
        Probe.builtin().fingerprint,
    ]


def test_builtin_probe_needs_tokenizers_and_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(builtin_text.default_tokenizer(), Tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'needs the package "tokenizers".*pip install "ib-callback\[hf\]"'):
        Probe.builtin()
