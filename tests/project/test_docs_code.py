"""Code blocks of README and docs: every one is run, or at least its names of ours are looked up.

A block is run with the names of its page's earlier blocks, and with those of `given`. It is not run if it needs what a
test has not: an ellipsis stands for the reader's own code, and some probes are downloaded. The quick starts are scripts
of their own; here they take fewer steps, with IB_DOCS_IN_FULL=1 (as in .ci/docs) as many as they say.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ib_callback as ib
from ib_callback.cli.main import main
from ib_callback.hf import IBCallback
from ib_callback.probe import builtin_text

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
QUICKSTARTS = sorted(name for name in PAGES if "/quickstart/" in name)
IN_FULL = os.environ.get("IB_DOCS_IN_FULL") == "1"
# Methods that ask the hub for text, and what stands for code of the reader.
NEEDS_NETWORK = re.compile(r"\b(from_c4|from_tulu)\(")
# Names that a reader of any page knows.
KNOWN = {"ib": ib, "IBCallback": IBCallback}
UnknownNames = Callable[..., list[str]]
# How long the quick starts train, as they write it.
STEPS = {r"(max_steps=|\bsteps = )60\b": r"\g<1>3", r"(range\()61\b": r"\g<1>21"}


def blocks_of(name: str) -> tuple[Document, list[Example]]:
    document = Sybil([PythonCodeBlockParser()]).parse(PAGES[name])
    return document, list(document.examples())


def source_of(example: Example) -> str:
    """The code as Python, in which the sign … is not one."""
    return str(example.parsed).replace("…", "...")


def runs(source: str) -> bool:
    ellipsis = any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(ast.parse(source)))
    return not ellipsis and not NEEDS_NETWORK.search(source)


NAMES = [name for name in PAGES if blocks_of(name)[1]]


@pytest.fixture(scope="module", autouse=True)
def short_text() -> Iterator[None]:
    """For the built-in text, which takes seconds to read, the pages themselves."""
    if IN_FULL:
        yield
        return
    paragraphs = [part for path in PAGES.values() for part in path.read_text(encoding="utf-8").split("\n\n")]
    documents = tuple(tuple(paragraphs[first : first + 3]) for first in range(0, len(paragraphs) - 2, 3))
    caches = (builtin_text._split, builtin_text._default_tokenizer, builtin_text.corpus_fingerprint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin_text, "_documents", lambda: documents)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reader of a page has at hand: a model, text, probes, measurements, files."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=builtin_text.default_tokenizer(), eos_token="<|endoftext|>")
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}
    model, other = (GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **config)).eval() for _ in range(2))
    texts = [" ".join(str((number + 3) * step % 97) for step in range(1, 200)) for number in range(6)]
    probe = ib.Probe.from_texts(texts, tokenizer, num_sequences=4, max_length=64)
    answers = [{"prompt": f"{n}?", "chosen": " 1 2 3 4 5 6 7 8 9", "rejected": " 9 8 7 6 5 4 3 2 1"} for n in range(8)]
    pairs = ib.Probe.from_preferences(answers, tokenizer, max_length=48)
    meter = ib.Meter(probe, standard_errors=4)
    first, second = meter.measure(model, step=0), meter.measure(other, step=1)
    trajectory = ib.Trajectory([first, second])
    folder = tmp_path_factory.mktemp("reader")
    rows = [{"text": text, "lang": "en", "pos": "NOUN"} for text in texts]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"model": "EleutherAI/pythia-14m", **point.to_dict()} for point in trajectory]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids, mask = probe.input_ids, probe.attention_mask
    return {
        "ib": ib, "IBCallback": IBCallback, "torch": torch, "tokenizer": tokenizer, "texts": texts, "probe": probe,
        "model": model, "meter": meter, "trajectory": trajectory, "c4": probe, "pairs": pairs,
        "c4_probe": probe, "code_probe": probe,
        "earlier": first, "later": second, "untrained": first, "trained": second,
        "small": trajectory, "large": trajectory, "llama": model, "gpt2": other,
        "llama_tokenizer": tokenizer, "gpt2_tokenizer": tokenizer, "joint": torch.eye(3).numpy(),
        "hidden": model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1].detach(),
        "folder": folder, "num_steps": 1, "train_one_step": lambda model: None,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_ours_exist(name: str, unknown_names: UnknownNames) -> None:
    unknown = []
    for example in blocks_of(name)[1]:
        unknown += [f"line {example.line}: {problem}" for problem in unknown_names(source_of(example), **KNOWN)]
    assert not unknown


def test_names_of_ours_in_the_tutorial_exist(unknown_names: UnknownNames) -> None:
    # .ci/docs executes it, which takes a minute.
    notebook = json.loads((ROOT / "docs/tutorial/tutorial.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not unknown_names("\n".join(code), **KNOWN)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICKSTARTS])
def test_blocks_run(name: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in given["folder"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    document, examples = blocks_of(name)
    document.namespace.update(given, __name__="__main__")
    for example in examples:
        if runs(source_of(example)):
            example.evaluate()


@pytest.mark.filterwarnings("ignore:The schedule .* never fires")
@pytest.mark.parametrize("name", QUICKSTARTS)
def test_quick_starts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    text = PAGES[name].read_text(encoding="utf-8")
    assert any(re.search(steps, text) for steps in STEPS), "the number of steps is where it is looked for"
    for steps, fewer in {}.items() if IN_FULL else STEPS.items():
        text = re.sub(steps, fewer, text)
    page.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    commands = CodeBlockParser("bash", lambda example: command(example.parsed))
    document = Sybil([PythonCodeBlockParser(), commands]).parse(page)
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        example.evaluate()
    assert list(tmp_path.glob("ib_quickstart_*/ib_trajectory.jsonl")) or (tmp_path / "results.jsonl").exists()


def command(block: str) -> None:
    """Run those commands of a block that are ours."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words and words[0].endswith("ib-callback") and (IN_FULL or words[1] != "plot"):  # which takes seconds
            assert main(words[1:]) == 0, line


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("ib.Metre(probe)", "ib.Metre does not exist"),
        ("IBCallback(probe, every_step=5)", "IBCallback takes no every_step="),
        ("from ib_callback.plot import plain", "ib_callback.plot has no plain"),
        ("ib.Meter(probe, num_bins=10).measure(model)", None),
    ],
)
def test_what_does_not_exist_is_found(source: str, problem: str | None, unknown_names: UnknownNames) -> None:
    assert unknown_names(source, **KNOWN) == ([problem] if problem else [])
