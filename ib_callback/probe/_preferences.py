"""Turn preference pairs into the sequences of a probe: pair i becomes sequences 2i, preferred, and 2i + 1, rejected.

A row becomes two texts. For each text the code finds where the preferred or rejected continuation begins.
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
# Names of the label's values 0 and 1.
LABEL_NAMES = ("rejected", "preferred")
REASONS = {
    "tie": "with equal texts or scores",
    "empty": "with an empty continuation",
    "template": "refused by the chat template",
    "long": "with a prompt that fills max_length",
}
PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
SCORES = ("score_chosen", "score_rejected")
COLUMNS = (PROMPT, CHOSEN, REJECTED, *SCORES)
# Used for chat templates that ask for today's date; Llama 3's own template falls back to the same one.
DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class Member(NamedTuple):
    """A text, and the first character of its continuation; None: it begins where the tokens of both members differ."""

    text: str
    border: int | None


class Pair(NamedTuple):
    """A preferred and a rejected text.

    templated: a chat template wrote the texts, so they hold all special tokens already.
    """

    chosen: Member
    rejected: Member
    templated: bool


class DropError(Exception):
    """A row that makes no pair; the argument is the reason, one of the words in REASONS."""


def collect_pairs(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    sizes: Sizes,
    *,
    name: str,
    source: Mapping[str, str],
    progress: Callable[[int], object] = lambda _: None,
) -> Content:
    """Tokenise pairs in order until there are `num_sequences` sequences, two for each pair.

    Args:
        rows: read no further than needed.
        tokenizer: see `Encoder`.
        sizes: with an even number of sequences.
        name: name of the probe.
        source: how the probe is made. This function adds sizes, and how many pairs were read and left out, and why.
        progress: called with the number of sequences so far.

    Raises:
        ProbeError: `sizes` asks for an odd number of sequences, no row makes a pair, or a row has the wrong content.
        TypeError: `tokenizer` is not a tokenizer.
    """
    number = sizes.num_sequences
    if number is not None and number % 2:
        raise ProbeError(
            f"num_sequences: expected an even number, because each pair makes two sequences, got {number}. "
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
            f"pairs: expected at least one usable pair, but none of the {read} rows can be used "
            f"({reasons or 'no rows'}). Raise max_length if prompts are long. Rows need the columns chosen and "
            "rejected."
        )
    counts = {"pairs_read": read} | {f"pairs_dropped_{reason}": dropped[reason] for reason in REASONS}
    return table.content(name, {**source, **sizes.noted()}, counts, tokenizer)


def read_pair(row: Mapping[str, Any], tokenizer: Any, index: int) -> Pair:
    """The two texts of a row.

    Strings are joined as they are, prompt and continuation. If neither has white space at the joint, a blank line goes
    between them. Without a prompt, the common beginning of both texts is the prompt. The tokenizer's chat template
    writes lists of messages `{"role": …, "content": …}`. Without a template they become `Role: content`, with blank
    lines between. The messages at which both lists begin alike are the prompt. The row's prompt goes before lists that
    begin with the assistant.

    Args:
        row: with `chosen` and `rejected`; optionally with `prompt`, `score_chosen` and `score_rejected`.
        tokenizer: of transformers or `tokenizers`.
        index: index of the row, for messages.

    Raises:
        DropError: equal texts or scores, a continuation without text, or messages that the chat template refuses.
        ProbeError: a column is missing or holds something else.
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
    # Texts written by a chat template hold their special tokens already.
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
    # Different texts can have equal tokens, because templates trim, tokenizers fold case, and both texts are cut. A
    # sequence that is both preferred and rejected says nothing about preference, and hides what other pairs say.
    same = np.array_equal(encoded[0].ids, encoded[1].ids)
    if same and (complete or len(encoded[0].ids) < max_length):
        raise DropError("tie")
    if not complete:
        raise DropError("long")
    return rows


def _start(text: str, border: int, encoded: Encoded, whole: Encoder, templated: bool) -> int:
    """The first token of the continuation.

    A token with characters of both prompt and continuation belongs to the continuation, because the continuation
    decides which token it is. If the tokenizer does not say where tokens come from, the prompt is tokenised alone to
    find the start.
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
        # The speaker's role is not part of what was preferred.
        return Member(text, len(before) + len(rest[0]["role"]) + 1)
    try:
        fixed = _with_fixed_date(tokenizer)
        text = tokenizer.apply_chat_template(prompt + rest, tokenize=False, **fixed)
        if not prompt:
            return Member(text, None)
        answers = rest[0]["role"] == "assistant"
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=answers, **fixed)
    except Exception as error:  # jinja2's errors, and any error that the template itself raises
        if not type(error).__module__.startswith("jinja2"):
            raise
        raise DropError("template") from error
    # Some templates write earlier turns in a different way from the last one.
    return Member(text, _common_start(before, text))


def _after_shared(members: list[Member], contents: list[str]) -> list[Member]:
    """Move the borders to the first messages of the continuations, if everything before is the same in both members.

    The border found before can be too early: templates write more before an answer (an empty `<think>` block) than
    when they ask for one, and write earlier turns in a different way from the last one.
    """
    if any(member.border is None for member in members):
        return members
    begins = [member.text.find(content, member.border) for member, content in zip(members, contents, strict=True)]
    between = {member.text[member.border : begin] for member, begin in zip(members, begins, strict=True)}
    if min(begins) < 0 or len(between) > 1:
        return members
    return [Member(member.text, begin) for member, begin in zip(members, begins, strict=True)]


def _with_fixed_date(tokenizer: Any) -> dict[str, str]:
    """Keyword arguments that make a chat template write a fixed date instead of today's.

    With today's date, the probe would be a different one tomorrow.
    """
    template = tokenizer.chat_template
    if "strftime_now" not in json.dumps(template):
        return {}
    if not isinstance(template, str):  # several templates, by name
        template = tokenizer.get_chat_template()
    # Replaced in the template's source, because transformers passes no function of a caller into a template.
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
    """Write a conversation as one text, `Role: content` with blank lines between; a string stays as it is.

    Raises:
        ProbeError: `messages` is neither.
    """
    if isinstance(messages, str):
        return messages
    found = _messages(messages, CHOSEN, index)
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in found)


def _common_start(first: str, second: str) -> int:
    """Length of the common beginning of two texts, in characters."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common beginning of two texts, in tokens."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
