"""docs/troubleshooting.md has an entry for every error and warning of the package, and no entry for one that is gone.

Messages are found in the source: in `raise SomeError(…)`, and in calls of the functions in SAID. The page quotes them
word for word: a paragraph that begins with a backtick lists the quotes of an entry, `first quote` · `second quote`. A
message has an entry if one of its constant parts contains one of the quotes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ib_callback"
PAGE = ROOT / "docs" / "troubleshooting.md"

# Functions that users hear: what is passed to one of these is a message. A function that passes its own argument on to
# one of these belongs here too; a test says which one is missing.
SAID = {
    "warn", "messages.warn", "warnings.warn", "_warn", "self._warn", "_log.warning", "note", "tell", "_tell",
    "_tell_once", "sweep.tell", "self._sweep.tell", "announce", "run.announce", "self.announce", "self._run.announce",
    "say", "survived", "run.survived", "self.survived", "self._run.survived", "ranks.awaited", "self._stop",
}  # fmt: skip
# Functions that make messages which something else passes to one of those: each of their sentences is a message.
MADE = {"_refusal", "remarks", "_on_the_guard", "memorising_note", "too_few_pairs", "explanation"}
# Errors that the package catches itself. Users never see them.
CAUGHT = {"AssertionError", "DropError"}
# Functions that only repeat what another error said, so that there is nothing to search for.
REPEATS = {
    "say",
    "entries_of",
    "fetch",
    "_pictures",
    "compare",
    "write_atomically",
    "_read",
    "_finish_files",
    "_layers",
    "agree",
    "prefix",
}
LEAST_WORDS = 2  # a constant part of fewer words says too little to be searched for
LEAST_SENTENCE = 5  # words that make a part of a function in MADE a message of its own
LEAST_QUOTE = 6  # characters: shorter quotes match too much


class Message(NamedTuple):
    """One place where the package says something, and the constant parts of what it says there."""

    where: str
    function: str
    parts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' … '.join(self.parts)}"


class Source:
    """All modules of the package, and the functions in them by name."""

    def __init__(self) -> None:
        self.trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
        self.functions: dict[str, list[ast.FunctionDef]] = {}
        self._known: dict[ast.FunctionDef, list[str]] = {}
        for tree in self.trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append(node)

    def messages(self) -> Iterator[Message]:
        for path, tree in self.trees.items():
            constants = _values(tree.body)
            for function, node in _sites(tree):
                values = constants if function is None else constants | _values_in(function)
                parts = tuple(dict.fromkeys(self._parts(node, values, depth=0)))
                yield Message(f"{path.relative_to(ROOT)}:{node.lineno}", function.name if function else "", parts)

    def _parts(self, node: ast.AST, values: dict[str, list[ast.AST]], depth: int) -> list[str]:
        """The constant parts in an expression; where it has none, those of the names and functions that it uses."""
        nodes = [n for top in (_body(node) if isinstance(node, ast.FunctionDef) else [node]) for n in ast.walk(top)]
        own = [each.value for each in nodes if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        own = [" ".join(text.split()) for text in own]
        if depth == 4 or any(_says_something(text) for text in own):
            return [text for text in own if text]
        for each in nodes:
            if isinstance(each, ast.Name):
                for value in values.get(each.id, []):
                    own += self._parts(value, values, depth + 1)
            elif isinstance(each, ast.Call):
                for function in self.functions.get(_name(each.func), []) if not _is_said(each) else []:
                    own += self._parts_of(function, depth + 1)
        return [text for text in own if text]

    def _parts_of(self, function: ast.FunctionDef, depth: int) -> list[str]:
        if function not in self._known:
            self._known[function] = []  # a function that calls itself adds nothing
            self._known[function] = self._parts(function, _values_in(function), depth)
        return self._known[function]


def _says_something(text: str) -> bool:
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= LEAST_WORDS


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _dotted(node: ast.AST) -> str:
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else _name(node)


def _body(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What a function does: without its docstring, and without what it raises itself."""
    stack: list[ast.AST] = [s for s in function.body if not _is_docstring(s)]
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.JoinedStr):
            stack += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.Raise)]


def _is_docstring(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


@cache
def _values_in(function: ast.FunctionDef) -> dict[str, list[ast.AST]]:
    return _values([function])


def _values(statements: list[ast.stmt] | list[ast.FunctionDef]) -> dict[str, list[ast.AST]]:
    """What each name stands for: of a module its constants, of a function all that is assigned to a name in it."""
    inside = [n for s in statements for n in (ast.walk(s) if isinstance(s, ast.FunctionDef) else [s])]
    values: dict[str, list[ast.AST]] = {}
    for node in inside:
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value is not None:
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = [(node.target, node.iter)]
        else:
            continue
        for target, value in pairs:
            for each in ast.walk(target):
                if isinstance(each, ast.Name):
                    values.setdefault(each.id, []).append(value)
    return values


def _sites(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.expr]]:
    """Every expression that makes a message, with the function that it is in."""
    stack: list[tuple[ast.FunctionDef | None, ast.AST]] = [(None, tree)]
    while stack:
        function, node = stack.pop()
        inner = node if isinstance(node, ast.FunctionDef) else function
        stack += [(inner, child) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.FunctionDef) and node.name in MADE:
            yield from ((node, each) for each in _body(node) if _is_sentence(each))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and not _is_said(node.exc):
            if node.exc.args and _name(node.exc.func) not in CAUGHT:
                yield function, node.exc
        elif isinstance(node, ast.Call) and node.args and _is_said(node):
            yield function, node


def _is_said(call: ast.Call) -> bool:
    name = _name(call.func)
    return (name.endswith("Error") and name not in CAUGHT) or _dotted(call.func) in SAID


def _is_sentence(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr):
        text = " ".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
    else:
        text = str(node.value) if isinstance(node, ast.Constant) else ""
    return len(text.split()) >= LEAST_SENTENCE


_PASSES_ON = REPEATS | {name.rpartition(".")[2] for name in SAID}


@cache
def messages() -> list[Message]:
    return sorted(Source().messages())


@cache
def quotes() -> dict[str, str]:
    """The quotes of the page, with the heading that each stands under."""
    found: dict[str, str] = {}
    heading = ""
    for paragraph in PAGE.read_text(encoding="utf-8").split("\n\n"):
        for line in paragraph.splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
        if paragraph.startswith("`"):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", paragraph), heading)
    return found


def test_every_message_can_be_searched_for() -> None:
    dumb = [
        message
        for message in messages()
        if message.function not in _PASSES_ON and not any(map(_says_something, message.parts))
    ]
    assert not dumb, (
        "what these places say is not found in the source. If the function passes on what it is given, add it to SAID; "
        "if it repeats another error, to REPEATS:\n" + "\n".join(map(str, dumb))
    )


def test_every_message_has_an_entry() -> None:
    missing = [
        message
        for message in messages()
        if message.function not in _PASSES_ON and not any(quote in part for part in message.parts for quote in quotes())
    ]
    assert not missing, (
        "these messages have no entry in docs/troubleshooting.md. Quote a part of each there, under a "
        "heading that fits or under a new one, and say what it means and what to do:\n" + "\n".join(map(str, missing))
    )


def test_every_entry_has_its_message() -> None:
    parts = [part for message in messages() for part in message.parts]
    stale = [
        f"{quote!r}, under {heading!r}" for quote, heading in quotes().items() if not any(quote in p for p in parts)
    ]
    assert not stale, (
        "these quotes of docs/troubleshooting.md are in no message any more. Quote what the message says today, "
        "or remove the entry:\n" + "\n".join(stale)
    )


def test_quotes_are_long_enough_to_be_found() -> None:
    assert [quote for quote in quotes() if len(quote) < LEAST_QUOTE] == []


def test_entries_say_what_to_do() -> None:
    """A heading with quotes has text too."""
    sections = re.split(r"^#+ ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    bare = []
    for section in sections:
        heading, *paragraphs = [each for each in section.split("\n\n") if each.strip()]
        quoted = [each for each in paragraphs if each.startswith("`")]
        if quoted and len(quoted) == len(paragraphs):
            bare.append(heading)
    assert bare == []
