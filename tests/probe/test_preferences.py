"""Preference pairs: what is labelled, what is left out, and that both members of a pair are there or neither is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from ib_callback import Probe, ProbeError
from ib_callback.measuring.quantities.features import feature_labels
from ib_callback.probe.ngrams import Positions

CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} ;\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges letters and the spaces before words, and has a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = "unbelievable believe able unable sky blue the is believer prompt answer user assistant".split()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words), " ".join(words[::-1])] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT)


def labelled(probe: Probe, row: int, tokenizer: Any) -> tuple[str, str, list[int]]:
    """The text of a row before the labels begin, from there on, and the distinct labels there."""
    ids, mask, labels = (tensor[row] for tensor in (probe.input_ids, probe.attention_mask, probe.labels["preference"]))
    ids, labels = ids[mask], labels[mask]
    return tokenizer.decode(ids[labels < 0]), tokenizer.decode(ids[labels >= 0]), labels[labels >= 0].unique().tolist()


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_strings_with_a_prompt() -> None:
    pairs = [{"prompt": "a b", "chosen": "c d", "rejected": "e"}, {"prompt": "f", "chosen": "a", "rejected": "b b"}]
    probe = Probe.from_preferences(pairs, word_tokenizer(), num_sequences=None)
    assert probe.input_ids.tolist() == [
        [1, 3, 4, 5, 6, 2],
        [1, 3, 4, 7, 2, 0],
        [1, 8, 3, 2, 0, 0],
        [1, 8, 4, 4, 2, 0],
    ]
    # Neither the prompt, nor what the tokenizer adds, nor padding.
    assert probe.labels["preference"].tolist() == [
        [-1, -1, -1, 1, 1, -1],
        [-1, -1, -1, 0, -1, -1],
        [-1, -1, 1, -1, -1, -1],
        [-1, -1, 0, 0, -1, -1],
    ]
    assert probe.label_names == {"preference": ("rejected", "preferred")}
    assert probe.name == "preferences"


def test_the_null_of_such_a_probe_swaps_within_pairs() -> None:
    pairs = [{"prompt": "a b", "chosen": "c d e f", "rejected": "e a b c d"}] * 6
    probe = Probe.from_preferences(pairs, word_tokenizer(), num_sequences=None)
    table = probe.labels["preference"].numpy()
    sequence, offset = np.nonzero(table >= 0)
    positions = cast(Positions, SimpleNamespace(sequence=sequence, offset=offset))
    permuted = feature_labels("preference", table, positions, seed=0).permuted
    assert permuted is not None
    first, second = permuted.reshape(len(permuted), -1, 2).transpose(2, 0, 1)
    assert (first + second == 1).all()
    assert 0.3 < first.mean() < 0.7


def test_strings_without_a_prompt_part_where_their_tokens_part() -> None:
    pairs = [{"chosen": "a b c d", "rejected": "a b e"}]
    probe = Probe.from_preferences(pairs, word_tokenizer(), num_sequences=None)
    assert probe.labels["preference"].tolist() == [[-1, -1, -1, 1, 1, -1], [-1, -1, -1, 0, -1, -1]]


@pytest.mark.parametrize(
    ("prompt", "chosen", "between"),
    [
        ("the sky is", " blue", ""),
        ("the sky is ", "blue", ""),
        ("the sky is", "blue", "\n\n"),
        ("the sky is\n", " blue", ""),
    ],
)
def test_white_space_at_the_border(prompt: str, chosen: str, between: str, merging: Any) -> None:
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": chosen + " able"}]
    probe = Probe.from_preferences(pairs, merging, num_sequences=None)
    before, after, labels = labelled(probe, 0, merging)
    assert before + after == prompt + between + chosen
    assert labels == [1]
    # A token that holds characters of both sides is the continuation's; no other token of the prompt is.
    assert after.strip() == "blue"
    assert len(prompt + between) - len(before) <= 1


def test_tokens_that_merge_across_the_border(merging: Any) -> None:
    assert len(merging(" unbelievable")["input_ids"]) == 1
    texts = "the unbelievable", "the unbeliever"
    probe = Probe.from_preferences([{"chosen": texts[0], "rejected": texts[1]}], merging, num_sequences=2)
    # By characters they part within a token, which belongs to the continuation whole.
    assert labelled(probe, 0, merging) == ("the", " unbelievable", [1])
    assert labelled(probe, 1, merging) == ("the", texts[1][3:], [0])
    # The space is the prompt's, the token that it is a part of is the continuation's.
    probe = Probe.from_preferences([{"prompt": "the ", "chosen": "sky", "rejected": "blue"}], merging, num_sequences=2)
    assert labelled(probe, 0, merging) == ("the", " sky", [1])
    assert labelled(probe, 1, merging) == ("the", " blue", [0])


def test_the_border_of_a_slow_tokenizer() -> None:
    tokenizer = ByT5Tokenizer()  # a byte is a token, and one at the end
    pairs = [{"prompt": "ab ", "chosen": "cd", "rejected": "é"}, {"chosen": "abc", "rejected": "abde"}]
    probe = Probe.from_preferences(pairs, tokenizer, num_sequences=None)
    assert probe.labels["preference"].tolist() == [
        [-1, -1, -1, 1, 1, -1],
        [-1, -1, -1, 0, 0, -1],
        [-1, -1, 1, -1, -1, -1],
        [-1, -1, 0, 0, -1, -1],
    ]


def test_messages_by_the_chat_template(merging: Any) -> None:
    question = [message("user", "the sky is"), message("assistant", "able"), message("user", "believe")]
    pairs = [
        {
            "prompt": "the sky is",
            "chosen": [*question, message("assistant", "blue sky")],
            "rejected": [*question, message("assistant", "unable")],
        },
        {"prompt": question, "chosen": [message("assistant", "blue")], "rejected": [message("assistant", "able")]},
        {"prompt": "believe", "chosen": [message("assistant", "blue")], "rejected": [message("assistant", "able")]},
    ]
    probe = Probe.from_preferences(pairs, merging, num_sequences=None)
    before = "[user] the sky is ;\n[assistant] able ;\n[user] believe ;\n[assistant]"
    assert labelled(probe, 0, merging) == (before, " blue sky ;\n", [1])
    assert labelled(probe, 1, merging) == (before, " unable ;\n", [0])
    assert labelled(probe, 2, merging) == (before, " blue ;\n", [1])
    assert labelled(probe, 4, merging) == ("[user] believe ;\n[assistant]", " blue ;\n", [1])


def test_special_tokens_of_a_chat_template_are_not_doubled() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        chat_template="[CLS] {% for m in messages %}{{ m.content }} [SEP] {% endfor %}",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    chosen = [message("user", "a"), message("assistant", "b c")]
    pairs = [{"chosen": chosen, "rejected": [chosen[0], message("assistant", "d")]}]
    probe = Probe.from_preferences(pairs, tokenizer, num_sequences=2)
    assert probe.input_ids.tolist() == [[1, 3, 2, 4, 5, 2], [1, 3, 2, 6, 2, 0]]
    # That an answer ends is a part of it.
    assert probe.labels["preference"].tolist() == [[-1, -1, -1, 1, 1, 1], [-1, -1, -1, 0, 0, -1]]


def test_answers_that_the_template_makes_equal_are_ties(merging: Any) -> None:
    twin = PreTrainedTokenizerFast(
        tokenizer_object=merging.backend_tokenizer, chat_template=CHAT.replace("m.content", "m.content | trim")
    )
    question = message("user", "the sky is")
    pairs = [
        {"chosen": [question, message("assistant", "blue")], "rejected": [question, message("assistant", "able")]},
        {"chosen": [question, message("assistant", "blue")], "rejected": [question, message("assistant", "blue ")]},
    ]
    with pytest.warns(UserWarning, match="left out 1 of 2 pairs: 1 with equal texts or scores"):
        assert len(Probe.from_preferences(pairs, twin, num_sequences=None)) == 2


def test_a_template_that_asks_for_the_date_gets_the_same_every_day(merging: Any) -> None:
    twin = PreTrainedTokenizerFast(
        tokenizer_object=merging.backend_tokenizer, chat_template="{{ strftime_now('%d %b %Y') }} " + CHAT
    )
    question = message("user", "the sky is")
    pairs = [{"chosen": [question, message("assistant", "blue")], "rejected": [question, message("assistant", "able")]}]
    probe = Probe.from_preferences(pairs, twin, num_sequences=2)
    assert labelled(probe, 0, twin) == ("26 Jul 2024 [user] the sky is ;\n[assistant]", " blue ;\n", [1])


@pytest.mark.parametrize("questions", [("is", "is"), ("is", "sky")])
def test_what_a_template_writes_before_both_answers_is_no_part_of_them(
    merging: Any, questions: tuple[str, str]
) -> None:
    # As templates of models that reason: the last answer has a block that earlier ones have not.
    template = (
        "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}"
        "{% endif %}{% endfor %}{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and loop.index0 > n.last %}<></>{% endif %}"
        "{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    twin = PreTrainedTokenizerFast(tokenizer_object=merging.backend_tokenizer, chat_template=template)
    begin = [message("user", "the"), message("assistant", "able")]
    chosen, rejected = (
        [*begin, message("user", question), message("assistant", answer)]
        for question, answer in zip(questions, ("blue", "unable"), strict=True)
    )
    probe = Probe.from_preferences([{"chosen": chosen, "rejected": rejected}], twin, num_sequences=2)
    if questions[0] == questions[1]:
        before = "[user]the;[assistant]able;[user]is;[assistant]<></>"
        assert labelled(probe, 0, twin) == (before, "blue;", [1])
        assert labelled(probe, 1, twin) == (before, "unable;", [0])
    else:
        before = "[user]the;[assistant]able;[user]"
        assert labelled(probe, 0, twin) == (before, "is;[assistant]<></>blue;", [1])
        assert labelled(probe, 1, twin) == (before, "sky;[assistant]<></>unable;", [0])


def test_content_in_parts_is_their_text(merging: Any) -> None:
    question, parts = (
        message("user", "the sky is"),
        [{"type": "text", "text": "the "}, {"type": "text", "text": "sky is"}],
    )
    answers = [message("assistant", "blue"), message("assistant", "able")]
    whole = [{"chosen": [question, answers[0]], "rejected": [question, answers[1]]}]
    in_parts: dict[str, Any] = {"role": "user", "content": parts}
    cut = [{"chosen": [in_parts, answers[0]], "rejected": [in_parts, answers[1]]}]
    found = [Probe.from_preferences(pairs, merging, num_sequences=2).fingerprint for pairs in (whole, cut)]
    assert found[0] == found[1]
    parts.append({"type": "image"})
    with pytest.raises(ProbeError, match=r"list of parts with text alone, got .*'image'.* in column chosen of row 0"):
        Probe.from_preferences(cut, merging, num_sequences=2)


def test_messages_without_a_template_are_written_plainly(merging: Any) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=merging.backend_tokenizer)
    chosen = [message("user", "the sky is"), message("assistant", "blue")]
    pairs = [{"chosen": chosen, "rejected": [chosen[0], message("assistant", "able")]}]
    probe = Probe.from_preferences(pairs, plain, num_sequences=2)
    assert labelled(probe, 0, plain) == ("User: the sky is\n\nAssistant:", " blue", [1])
    assert labelled(probe, 1, plain) == ("User: the sky is\n\nAssistant:", " able", [0])


def test_messages_of_one_turn_part_where_their_tokens_part(merging: Any) -> None:
    pairs = [{"chosen": [message("user", "the sky")], "rejected": [message("user", "the prompt")]}]
    probe = Probe.from_preferences(pairs, merging, num_sequences=2)
    assert labelled(probe, 0, merging) == ("[user] the", " sky ;\n", [1])


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "tie"),
    "equal but for white space": ({"prompt": "a", "chosen": "b", "rejected": " b"}, "tie"),
    "equal scores": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 3.0, "score_rejected": 3.0},
        "tie",
    ),
    "equal messages": ({"chosen": [message("user", "a")], "rejected": [message("user", "a")]}, "tie"),
    "the same ids": ({"prompt": "a", "chosen": "b zebra", "rejected": "b quagga"}, "tie"),
    "the same as far as they go": ({"prompt": "a", "chosen": "b c d e f g", "rejected": "b c d e f h"}, "tie"),
    "nothing chosen": ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty"),
    "nothing rejected": ({"prompt": "a", "chosen": "b", "rejected": None}, "empty"),
    "white space": ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "empty"),
    "one begins the other": ({"chosen": "a b", "rejected": "a b c"}, "empty"),
    "no messages": ({"chosen": [], "rejected": [message("user", "a")]}, "empty"),
    "an answer without text": (
        {
            "chosen": [message("user", "a"), message("assistant", "b")],
            "rejected": [message("user", "a"), {"role": "assistant", "content": None}],
        },
        "empty",
    ),
    "no room": ({"prompt": "a b c d e f g", "chosen": "b", "rejected": "c"}, "long"),
}
GOOD = {"prompt": "a", "chosen": "b c", "rejected": "d"}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_and_counted(case: str) -> None:
    row, reason = LEFT_OUT[case]
    settings: dict[str, Any] = {"num_sequences": None, "max_length": 7}
    with pytest.warns(UserWarning, match="left out 1 of 3 pairs: 1 ") as caught:
        probe = Probe.from_preferences([GOOD, row, GOOD], word_tokenizer(), **settings)
    assert caught[0].filename == __file__
    assert probe.fingerprint == Probe.from_preferences([GOOD, GOOD], word_tokenizer(), **settings).fingerprint
    counts = {key: value for key, value in probe.source.items() if key.startswith("pairs_")}
    kinds = ("tie", "empty", "template", "long")
    assert counts == {"pairs_read": "3"} | {f"pairs_dropped_{kind}": str(int(kind == reason)) for kind in kinds}


def test_a_pair_goes_whole_if_of_one_member_nothing_is_left() -> None:
    question = message("user", "a")
    # A byte is a token, and one ends the text. "User: a\n\n" is 9 bytes, "Assistant:" 10, "User:" 5.
    pairs = [{"chosen": [question, message("assistant", "b")], "rejected": [question, message("user", "b")]}]
    probe = Probe.from_preferences(pairs, ByT5Tokenizer(), num_sequences=2, max_length=9 + 10 + 2)
    assert (probe.labels["preference"] == 1).sum(1).tolist() == [1, 0]
    assert (probe.labels["preference"] == 0).sum(1).tolist() == [0, 2]
    with pytest.raises(ProbeError, match=r"none of the 1 rows can be used \(1 with a prompt that fills max_length\)"):
        Probe.from_preferences(pairs, ByT5Tokenizer(), num_sequences=2, max_length=9 + 10 + 1)
    # Without a prompt: all that is left of both is the same.
    shared = [{"chosen": "a b c", "rejected": "a b d"}]
    with pytest.raises(ProbeError, match="1 with a prompt that fills max_length"):
        Probe.from_preferences(shared, word_tokenizer(), num_sequences=2, max_length=4)


def test_what_the_template_refuses_is_left_out(merging: Any) -> None:
    turns = [message("system", "the"), message("user", "is")]
    pairs = [
        {"chosen": [*turns, message("assistant", "blue")], "rejected": [*turns, message("assistant", "able")]},
        {
            "chosen": [turns[1], message("assistant", "blue")],
            "rejected": [turns[1], message("assistant", "able")],
        },
    ]
    with pytest.warns(UserWarning, match="left out 1 of 2 pairs: 1 refused by the chat template"):
        probe = Probe.from_preferences(pairs, merging, num_sequences=None)
    assert len(probe) == 2


def test_sequences_are_counted_and_come_in_pairs() -> None:
    tie = {"chosen": "a", "rejected": "a"}
    read = []

    def rows() -> Any:
        for row in [GOOD, tie, tie, GOOD, GOOD, GOOD]:
            read.append(row)
            yield row

    with pytest.warns(UserWarning, match="left out 2 of 4 pairs"):
        probe = Probe.from_preferences(rows(), word_tokenizer(), num_sequences=4)
    assert len(probe) == 4
    assert len(read) == 4
    with pytest.raises(
        ProbeError, match=r"num_sequences: expected an even number, because each pair .*, got 5\. Pass 6"
    ):
        Probe.from_preferences([GOOD], word_tokenizer(), num_sequences=5)
    with pytest.warns(
        UserWarning, match="asked for 4 sequences, got 2: there were 2 pairs; left out 1 of 2 pairs: 1 with"
    ):
        Probe.from_preferences([tie, GOOD], word_tokenizer(), num_sequences=4)


@pytest.mark.parametrize(
    ("rows", "message_"),
    [
        ([{"prompt": "a", "chosen": "b"}], "expected columns chosen and rejected, got prompt, chosen in row 0"),
        ([{"prompt": 3, "chosen": "b", "rejected": "c"}], "expected a prompt that is a string, got int in row 0"),
        ([{"chosen": "b", "rejected": [message("user", "a")]}], "lists of messages in both, got str in column chosen"),
        (
            [{"chosen": ["b"], "rejected": ["c"]}],
            "expected messages {'role': …, 'content': …}, got 'b' in column chosen",
        ),
        ([{"chosen": "a", "rejected": "a"}], r"none of the 1 rows can be used \(1 with equal texts or scores\)"),
        ([], r"none of the 0 rows can be used \(no rows\)"),
    ],
)
def test_unusable_pairs_are_refused(rows: list[dict[str, Any]], message_: str) -> None:
    with pytest.raises(ProbeError, match=message_):
        Probe.from_preferences(rows, word_tokenizer(), num_sequences=2)


def test_a_tokenizer_that_cuts_on_the_left_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), truncation_side="left")
    with pytest.raises(ProbeError, match=r"truncation_side='left'.*Set tokenizer.truncation_side = 'right'"):
        Probe.from_preferences([GOOD], tokenizer, num_sequences=2)


def test_pairs_are_cached_by_the_chat_template_too(tmp_path: Path, merging: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"chosen": [message("user", "a"), message("assistant", "b")], "rejected": [message("user", "a")]}
    pair["rejected"].append(message("assistant", "c"))
    path.write_text(json.dumps(pair) + "\n")
    other = PreTrainedTokenizerFast(tokenizer_object=merging.backend_tokenizer, chat_template=CHAT.replace(";", "!"))
    settings: dict[str, Any] = {"num_sequences": 2, "cache_dir": tmp_path / "cache"}
    first = Probe.from_preferences(path, merging, **settings)
    second = Probe.from_preferences(path, other, **settings)
    assert first.fingerprint != second.fingerprint
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert Probe.from_preferences(path, merging, **settings).fingerprint == first.fingerprint


def test_pairs_are_cached_by_the_special_tokens_that_the_template_writes(tmp_path: Path, merging: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = {"chosen": [message("user", "a"), message("assistant", "b")], "rejected": [message("user", "a")]}
    pair["rejected"].append(message("assistant", "c"))
    path.write_text(json.dumps(pair) + "\n")
    probes = []
    for token in "xy":  # both are entries already
        twin = copy.deepcopy(merging)
        twin.chat_template = "{{ bos_token }} " + CHAT
        twin.bos_token = token
        probes.append(Probe.from_preferences(path, twin, num_sequences=2, cache_dir=tmp_path / "cache"))
    assert probes[0].input_ids[0, 0] != probes[1].input_ids[0, 0]
