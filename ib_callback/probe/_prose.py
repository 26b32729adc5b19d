"""Extract the paragraphs of English from a docstring, without markup, code, tables and formulas."""

from __future__ import annotations

import inspect
import re

# Words of English grammar, which any subject needs. Text with few of them is not running prose.
FUNCTION_WORDS = frozenset(
    "a about after all also an and any are as at be because been before both but by can could do does each "
    "for from has have how if in into is it its may more must no not of on one only or other should so some "
    "such than that the their then there these they this to two use used using was we when where whether "
    "which while will with without would you your".split()
)
MIN_WORDS = 6

_PROSE_DIRECTIVES = frozenset("note notes warning caution tip important attention admonition topic".split())
_DIRECTIVE = re.compile(r"\.\. +([\w-]+):: *(.*)")
_BULLET = re.compile(r"(?:[-*+•]|\(?\d{1,2}[.)]|#\.) +(.*)")
_FIELD = re.compile(r":[\w ,*.]+: +(.*)")
# "name (type): description" and "name: description", as in Google style
_ARGUMENT = re.compile(r"\*{0,2}\w+(?: *\([^()]*(?:\([^()]*\)[^()]*)*\))?: +(.*)")
# "name : type", as in NumPy style: the description follows, indented
_PARAMETER = re.compile(r"[\w*.,\[\](){}'\" ]+ :(?: .*)?")
# "Args:", "Returns:", "Keyword args:"
_SECTION = re.compile(r"\w+(?: \w+){0,2}:")
_RULE = re.compile(r"([=\-~^\"'`#*+._:])\1{2,} *$")

_INLINE = (
    (re.compile(r":[\w:+-]+:`~(?:[^`<>]*\.)?([^`<>.]+)`"), r"\1"),  # :func:`~package.name` is shown as "name"
    (re.compile(r":[\w:+-]+:`([^`<>]+?) *<[^`]*>`"), r"\1"),  # :ref:`title <target>`
    (re.compile(r":[\w:+-]+:`([^`]+)`"), r"\1"),
    (re.compile(r"`([^`<>]+?) *<[^`<>]*>`_{0,2}"), r"\1"),  # `title <address>`_
    (re.compile(r" ?\[[\w#*]+\]_"), ""),  # [1]_
    (re.compile(r"``?([^`]+)``?_{0,2}"), r"\1"),
    (re.compile(r"\*\*?(\w(?:[^*]*\w)?[.:,]?)\*\*?"), r"\1"),
)
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
# A match reaches to the end of the word, so a word counts once.
_SYMBOLIC = re.compile(r"(?:\w\.\w|[_=(){}\[\]<>|/@#$%^*+~0-9])\S*")
_TEMPLATE = re.compile(r"\{\w*\}|%\(?\w+\)?s|%[sdr]\b|\\|https?:|>>>|::")


def _is_prose(text: str) -> bool:
    words = _WORD.findall(text)
    if len(words) < MIN_WORDS or _TEMPLATE.search(text):
        return False
    if len(text.encode("ascii", "ignore")) < 0.98 * len(text):
        return False
    symbols = len(_SYMBOLIC.findall(text))
    grammar = sum(map(FUNCTION_WORDS.__contains__, map(str.lower, words)))
    return symbols <= 0.2 * (text.count(" ") + 1) and grammar >= 0.25 * len(words)


def _plain(lines: list[str]) -> str:
    text = " ".join(" ".join(lines).split())
    if "`" in text or "*" in text or "]_" in text:
        for pattern, replacement in _INLINE:
            text = pattern.sub(replacement, text)
    if text.endswith("::"):
        text = text[:-1]
    return text.strip()


def _blocks(docstring: str) -> list[list[str]]:
    """Runs of lines that belong together, without section titles, code, tables and most directives."""
    blocks: list[list[str]] = [[]]
    indents: list[int] = []  # indents of the lines of the last block
    code_deeper_than: int | None = None
    doctest = False

    def close() -> None:
        nonlocal code_deeper_than
        if blocks[-1]:
            if blocks[-1][-1].endswith("::"):
                code_deeper_than = indents[-1]
            blocks.append([])
            indents.clear()

    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text:
            doctest = False
            close()
            continue
        if code_deeper_than is not None:
            if indent > code_deeper_than:
                continue
            code_deeper_than = None
        if text.startswith((">>>", "... ", "In [", "$ ")):
            doctest = True
            close()
        if doctest:
            continue
        if _RULE.match(text):
            blocks[-1] = blocks[-1][:-1]  # the line above is a section title
            indents[:] = indents[:-1]
            close()
        elif text.startswith(".. "):
            close()
            directive = _DIRECTIVE.match(text)
            if directive is None or directive.group(1) not in _PROSE_DIRECTIVES:
                code_deeper_than = indent
            elif directive.group(2):
                blocks[-1].append(directive.group(2))
                indents.append(indent)
        elif text.startswith(("|", "+-", "+=")) or _SECTION.fullmatch(text):
            close()
        else:
            item = _BULLET.match(text) or _FIELD.match(text)
            if item is None and (not indents or indent <= min(indents)):
                item = _ARGUMENT.match(text)
            if item is not None:
                close()
                text = item.group(1)
            elif indents and indent < indents[-1]:
                close()
            elif len(indents) == 1 and indent > indents[0] and " " not in blocks[-1][0]:
                close()  # NumPy style "Returns": a type alone on its line, then the description
            if item is None and not indents and _PARAMETER.fullmatch(text):
                continue
            blocks[-1].append(text)
            indents.append(indent)
    return blocks


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of English prose in a docstring, in order, each on one line and without markup.

    Examples:
        >>> paragraphs('''Sum of the elements.
        ...
        ... The sum is taken over *all* of the axes unless you say with ``axis`` which of them to use.
        ...
        ... >>> total([1, 2])
        ... 3
        ... ''')
        ['The sum is taken over all of the axes unless you say with axis which of them to use.']
    """
    texts = [_plain(block) for block in _blocks(docstring) if block]
    return [text for text in texts if _is_prose(text)]
