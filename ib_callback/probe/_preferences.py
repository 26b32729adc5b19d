"""Preference pairs to the sequences of a probe: pair i is sequences 2i, preferred, and 2i + 1, rejected.

A row becomes two texts, and the place in each where the continuation begins that was preferred or rejected.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ib_callback.common.errors import ProbeError
from ib_callback.probe._labels import LabelReader
from ib_callback.probe._texts import Sizes, Table
from ib_callback.probe._tokenizing import Encoded, Encoder, bytes_predicted
from ib_callback.probe.content import NO_LABEL, Content

FEATURE = "preference"
# By number, 0 and 1.
LABEL_NAMES = ("rejected", "preferred")
REASONS = {
    "tie": "with equal texts or scores",
    "empty": "with an empty continuation",
    "template": "rejected by the chat template",
    "long": "with a prompt that fills max_length",
}
PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
SCORES = ("score_chosen", "score_rejected")
COLUMNS = (PROMPT, CHOSEN, REJECTED, *SCORES)
# For chat templates that ask for today's: the one that Llama 3's template itself falls back to.
DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class Member(NamedTuple):
    """A text, and the first character of its continuation; None: the tokens that both members share tell."""

    text: str
    border: int | None


class Pair(NamedTuple):
    """A preferred and a rejected text.

    templated: they hold all special tokens already, by a chat template.
    """

    chosen: Member
    rejected: Member
    templated: bool


class DropError(Exception):
    """What makes no pair; its argument is the reason in one word, of those in REASONS."""


def collect_pairs(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    sizes: Sizes,
    *,
    name: str,
    source: Mapping[str, str],
    progress: Callable[[int], object] = lambda _: None,
) -> Content:
    """Tokenise pairs in order, until `num_sequences` sequences are there, two a pair.

    Args:
        rows: read no further than needed.
        tokenizer: see `Encoder`.
        sizes: with an even number of sequences.
        name: of the probe.
        source: how it is made; sizes, and how many pairs were read and left out and why, are added.
        progress: called with the number of sequences so far.

    Raises:
        ProbeError: an odd number is asked for, no row makes a pair, or a row is none.
        TypeError: `tokenizer` is not a tokenizer.
    """
    number = sizes.num_sequences
    if number is not None and number % 2:
        raise ProbeError(
            f"num_sequences: expected an even number, two sequences per pair, got {number}. "
            f"Pass {number + 1} or {number - 1 or 2}."
        )
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise ProbeError(
            "tokenizer: expected one that truncates on the right, got truncation_side='left', which would cut off the "
            "prompts of pairs. Set tokenizer.truncation_side = 'right'."
        )
    encoder, whole = Encoder(tokenizer, sizes.max_length), Encoder(tokenizer, None)
    dropped: Counter[str] = Counter()
    read = 0
    table = Table([LabelReader(FEATURE, LABEL_NAMES)])
    for row in rows:
        read += 1
        try:
            pair = read_pair(row, tokenizer, read - 1)
            labelled = _labelled(pair, encoder, whole, sizes.max_length)
        except DropError as reason:
            dropped[str(reason)] += 1
            continue
        for ids, labels, num_bytes in labelled:
            table.add(ids, [labels], num_bytes=num_bytes)
        progress(len(table))
        if len(table) == number:
            break
    if not len(table):
        reasons = ", ".join(f"{number} {REASONS[reason]}" for reason, number in dropped.items())
        raise ProbeError(
            f"pairs: expected at least one usable pair, got {read} rows, none usable ({reasons or 'no rows'}). "
            "Raise max_length if prompts are long; pass rows with chosen and rejected."
        )
    counts = {"pairs_read": read} | {f"pairs_dropped_{reason}": dropped[reason] for reason in REASONS}
    return table.content(name, {**source, **sizes.noted()}, counts, tokenizer)


def read_pair(row: Mapping[str, Any], tokenizer: Any, index: int) -> Pair:
    """The two texts of a row.

    Strings are taken as text: the prompt, if there is one, and the continuation as they are, or with a blank line
    between them where neither has white space there. Without a prompt, it is what both texts begin with. Lists of
    messages `{"role": …, "content": …}` go through the tokenizer's chat template; without one they are written
    as `Role: content`, with blank lines between. The messages that both lists begin with are the prompt; lists that
    begin with the assistant are preceded by the row's prompt.

    Args:
        row: with `chosen` and `rejected`, perhaps `prompt`, perhaps `score_chosen` and `score_rejected`.
        tokenizer: of transformers or `tokenizers`.
        index: of the row, for messages.

    Raises:
        DropError: equal texts or scores, a continuation without text, or messages that the chat template refuses.
        ProbeError: the row has no such columns, or they hold something else.
    """
    missing = [column for column in (CHOSEN, REJECTED) if column not in row]
    if missing:
        raise ProbeError(
            f"pairs: expected columns {CHOSEN} and {REJECTED}, got {', '.join(map(str, row)) or 'none'} in row {index}."
        )
    chosen, rejected, prompt = row[CHOSEN], row[REJECTED], row.get(PROMPT)
    if not chosen or not rejected:
        raise DropError("empty")
    scores = [row.get(score) for score in SCORES]
    if chosen == rejected or (scores[0] is not None and scores[0] == scores[1]):
        raise DropError("tie")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None and not isinstance(prompt, str):
            raise ProbeError(f"pairs: expected a prompt that is a string, got {type(prompt).__name__} in row {index}.")
        return _of_strings(prompt, chosen, rejected)
    return _of_messages(
        prompt, _messages(chosen, CHOSEN, index), _messages(rejected, REJECTED, index), tokenizer, index
    )


def _labelled(
    pair: Pair, encoder: Encoder, whole: Encoder, max_length: int
) -> list[tuple[np.ndarray, np.ndarray, int | None]]:
    """Ids, labels and bytes of both members of a pair.

    Raises:
        DropError: "tie" or "long".
    """
    members = (pair.chosen, pair.rejected)
    # Those of a chat template hold their special tokens already.
    encoded = [encoder(member.text, places=True, special_tokens=not pair.templated) for member in members]
    shared = _shared(encoded[0].ids, encoded[1].ids)
    rows = []
    for member, one, preferred in zip(members, encoded, (1, 0), strict=True):
        labels = np.full(len(one.ids), NO_LABEL, np.int64)
        start = shared if member.border is None else _start(member.text, member.border, one, whole, pair.templated)
        labels[start:] = preferred
        if one.special is not None:
            labels[one.special] = NO_LABEL
        rows.append((one.ids, labels, bytes_predicted(member.text, one)))
    complete = all((labels != NO_LABEL).any() for _, labels, _ in rows)
    # Also of texts that differ: templates trim, tokenizers fold case, and both are cut. One sequence that is
    # preferred and rejected tells nothing of preference, and hides what other pairs tell.
    same = np.array_equal(encoded[0].ids, encoded[1].ids)
    if same and (complete or len(encoded[0].ids) < max_length):
        raise DropError("tie")
    if not complete:
        raise DropError("long")
    return rows


def _start(text: str, border: int, encoded: Encoded, whole: Encoder, templated: bool) -> int:
    """The first token of the continuation.

    A token that holds characters of both prompt and continuation belongs to the continuation: which token it is
    depends on it. Where tokenizers do not know where tokens come from, the tokens of the prompt alone tell.
    """
    if encoded.offsets is None:
        return _shared(encoded.ids, whole(text[:border], special_tokens=not templated).ids)
    return int((encoded.offsets[:, 1] <= border).cumprod().sum())


def _of_strings(prompt: str | None, chosen: str, rejected: str) -> Pair:
    if not chosen.strip() or not rejected.strip():
        raise DropError("empty")
    if chosen.strip() == rejected.strip():
        raise DropError("tie")
    if not prompt:
        begin = _common_start(chosen, rejected)
        if not chosen[begin:].strip() or not rejected[begin:].strip():
            raise DropError("empty")
        return Pair(Member(chosen, None), Member(rejected, None), templated=False)

    def joined(continuation: str) -> Member:
        between = "" if prompt[-1].isspace() or continuation[0].isspace() else "\n\n"
        return Member(prompt + between + continuation, len(prompt + between))

    return Pair(joined(chosen), joined(rejected), templated=False)


def _of_messages(
    prompt: Any, chosen: list[dict[str, str]], rejected: list[dict[str, str]], tokenizer: Any, index: int
) -> Pair:
    before: list[dict[str, str]] = []
    if chosen[0]["role"] == rejected[0]["role"] == "assistant" and prompt:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, PROMPT, index)
    chosen, rejected = before + chosen, before + rejected
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        raise DropError("tie")
    rests = [chosen[same:], rejected[same:]]
    if any(not any(message["content"].strip() for message in rest) for rest in rests):
        raise DropError("empty")
    template = bool(getattr(tokenizer, "chat_template", None))
    members = [_member(chosen[:same], rest, tokenizer if template else None) for rest in rests]
    if template:
        members = _after_shared(members, [rest[0]["content"].strip() for rest in rests])
    return Pair(members[0], members[1], templated=template)


def _member(prompt: list[dict[str, str]], rest: list[dict[str, str]], tokenizer: Any) -> Member:
    if tokenizer is None:
        before = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in prompt)
        text = before + "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in rest)
        # The name of who speaks is no part of what is preferred.
        return Member(text, len(before) + len(rest[0]["role"]) + 1)
    try:
        fixed = _with_fixed_date(tokenizer)
        text = tokenizer.apply_chat_template(prompt + rest, tokenize=False, **fixed)
        if not prompt:
            return Member(text, None)
        answers = rest[0]["role"] == "assistant"
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=answers, **fixed)
    except Exception as error:  # jinja2's errors, and whatever a template raises by itself
        if not type(error).__module__.startswith("jinja2"):
            raise
        raise DropError("template") from error
    # Some templates write earlier turns otherwise than the last one.
    return Member(text, _common_start(before, text))


def _after_shared(members: list[Member], contents: list[str]) -> list[Member]:
    """Borders where the first messages of the continuations begin, if all before is the same in both members.

    Templates write more before an answer than they do to ask for one (an empty `<think>` block), and write earlier
    turns otherwise than the last one.
    """
    if any(member.border is None for member in members):
        return members
    begins = [member.text.find(content, member.border) for member, content in zip(members, contents, strict=True)]
    between = {member.text[member.border : begin] for member, begin in zip(members, begins, strict=True)}
    if min(begins) < 0 or len(between) > 1:
        return members
    return [Member(member.text, begin) for member, begin in zip(members, begins, strict=True)]


def _with_fixed_date(tokenizer: Any) -> dict[str, str]:
    """Keywords by which a chat template that writes today's date writes one that is the same every day.

    The probe of tomorrow, or of another machine, would be another one.
    """
    template = tokenizer.chat_template
    if "strftime_now" not in json.dumps(template):
        return {}
    if not isinstance(template, str):  # several, by name
        template = tokenizer.get_chat_template()
    # In the source, for transformers lets no function of a caller into a template.
    return {"chat_template": _TODAY.sub(lambda found: json.dumps(DATE.strftime(found[2])), template)}


def _messages(value: Any, column: str, index: int) -> list[dict[str, str]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ProbeError(
            f"pairs: expected strings in both {CHOSEN} and {REJECTED}, or lists of messages in both, got "
            f"{type(value).__name__} in column {column} of row {index}."
        )
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ProbeError(
                f"pairs: expected messages {{'role': …, 'content': …}}, got {message!r} in column {column} of row "
                f"{index}."
            )
        messages.append({"role": message["role"], "content": _content(message.get("content"), column, index)})
    return messages


def _content(content: Any, column: str, index: int) -> str:
    """Text of a message: a string, parts `{"type": "text", "text": …}`, or None (calls of tools)."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise ProbeError(
        f"pairs: expected the content of a message to be a string, or a list of parts with text alone, got "
        f"{content!r} in column {column} of row {index}. Leave out everything that is not text."
    )


def written_out(messages: Any, index: int) -> str:
    """A conversation as one text, `Role: content` with blank lines between; a string is one already.

    Raises:
        ProbeError: it is neither.
    """
    if isinstance(messages, str):
        return messages
    found = _messages(messages, CHOSEN, index)
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in found)


def _common_start(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts begin with in common."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
