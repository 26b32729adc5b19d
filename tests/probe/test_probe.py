"""The probe: what it accepts, that it is frozen, and what its fingerprint covers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ib_callback import Probe, ProbeError

IDS = [[11, 12, 13, 14], [21, 22, 23, 0], [31, 32, 0, 0]]
RIGHT = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
LABELS = {"language": [[0, 0, 0, 0], [1, 1, 1, -1], [2, 2, -1, -1]]}


def small_probe() -> Probe:
    return Probe.from_tokens(IDS, RIGHT, labels=LABELS, name="small")


# ---------------------------------------------------------------- from_tokens


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_every_integer_kind_become_long(dtype: torch.dtype) -> None:
    for ids in (IDS, torch.tensor(IDS, dtype=dtype), torch.tensor(IDS, dtype=dtype).numpy(), np.array(IDS, np.uint16)):
        probe = Probe.from_tokens(ids)
        assert probe.input_ids.dtype == torch.long
        assert probe.input_ids.tolist() == IDS
        assert probe.attention_mask.dtype == torch.bool
        assert probe.attention_mask.all()


def test_parts_are_as_given() -> None:
    probe = small_probe()
    assert len(probe) == 3
    assert probe.num_tokens == 9
    assert probe.attention_mask.tolist() == [[bool(x) for x in row] for row in RIGHT]
    assert {name: label.tolist() for name, label in probe.labels.items()} == LABELS
    assert probe.labels["language"].dtype == torch.long
    assert (probe.name, probe.tokenizer, probe.source) == ("small", None, {"constructor": "from_tokens"})
    assert "small" in repr(probe)
    assert probe.fingerprint[:12] in repr(probe)


def test_tensors_are_contiguous_copies() -> None:
    ids, mask, label = torch.tensor(IDS).T, torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.int32)
    mask = mask.long()
    probe = Probe.from_tokens(ids, mask, labels={"f": label})
    ids.zero_()
    mask.zero_()
    label.fill_(7)
    assert probe.input_ids.T.tolist() == IDS
    assert probe.attention_mask.all()
    assert (probe.labels["f"] == 0).all()
    assert all(t.is_contiguous() for t in (probe.input_ids, probe.attention_mask, probe.labels["f"]))
    probe.verify()


@pytest.mark.parametrize(
    "mask",
    [
        [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]],
        [[0, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]],
        [[True, True, False, False]] * 3,
    ],
    ids=["left", "both ends", "booleans"],
)
def test_padding_at_the_ends_is_accepted_and_emptied(mask: list[list[int]]) -> None:
    ids = [[5, 6, 7, 8]] * 3
    probe = Probe.from_tokens(ids, mask, labels={"f": [[4, 4, 4, 4]] * 3})
    for b in range(3):
        for s in range(4):
            real = bool(mask[b][s])
            assert probe.attention_mask[b, s] == real
            assert probe.input_ids[b, s] == (ids[b][s] if real else 0)
            assert probe.labels["f"][b, s] == (4 if real else -1)


def test_a_hole_is_refused() -> None:
    with pytest.raises(ProbeError, match="padding between the tokens of sequence 1"):
        Probe.from_tokens(IDS, [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [1, 2, 3]}, r"expected \[N, S\].*got shape \[3\]"),
        ({"input_ids": np.zeros((2, 3, 4), int)}, r"expected \[N, S\].*got shape \[2, 3, 4\]"),
        ({"input_ids": []}, "at least 1, got shape"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"at least 1, got shape \[0, 5\]"),
        ({"input_ids": [[1, 2], [3]]}, "rows of different lengths"),
        ({"input_ids": torch.ones(2, 3)}, "expected an integer dtype, got torch.float32"),
        ({"input_ids": [[0.5, 1.0]]}, "expected an integer dtype, got float64"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.bool)}, "expected an integer dtype, got torch.bool"),
        ({"input_ids": [["a", "b"]]}, "expected an integer dtype"),
        ({"input_ids": [[1, 2], [3, -7]]}, "got -7 in sequence 1"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask: expected \[N, S\] = \[3, 4\].*got shape \[1, 2\]"),
        ({"attention_mask": [[1, 1, 1, 2]] * 3}, "attention_mask: expected 1 or true .*got 2"),
        ({"attention_mask": torch.zeros(3, 4)}, "attention_mask: expected an integer dtype, got torch.float32"),
        ({"attention_mask": [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]}, "got none in sequence 1"),
        ({"labels": {"f": [0, 1, 2]}}, r"labels\['f'\]: expected \[N, S\] = \[3, 4\].*got shape \[3\]"),
        ({"labels": {"f": [[0, 0, 0, -2]] * 3}}, r"labels\['f'\]: expected 0 or more.*got -2 in sequence 0"),
        ({"labels": {"f": torch.zeros(3, 4)}}, r"labels\['f'\]: expected an integer dtype"),
        ({"labels": {3: IDS}}, "names that are non-empty strings, got 3"),
        ({"labels": IDS}, "labels: expected {name: .* got list"),
        ({"name": ""}, "name: expected a non-empty string"),
    ],
)
def test_unusable_content_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        Probe.from_tokens(**({"input_ids": IDS} | arguments))


def test_negative_ids_and_labels_under_padding_are_no_error() -> None:
    probe = Probe.from_tokens([[7, 8, -100]], [[1, 1, 0]], labels={"f": [[1, 0, -100]]})
    assert probe.input_ids.tolist() == [[7, 8, 0]]
    assert probe.labels["f"].tolist() == [[1, 0, -1]]


# ---------------------------------------------------------------- frozen


@pytest.mark.parametrize("attribute", "input_ids attention_mask labels name fingerprint source other".split())
def test_attributes_cannot_be_assigned(attribute: str) -> None:
    with pytest.raises(AttributeError, match=attribute):
        setattr(small_probe(), attribute, "anything")


def test_labels_and_source_cannot_be_extended() -> None:
    probe = small_probe()
    with pytest.raises(TypeError, match="item assignment"):
        probe.labels["new"] = probe.input_ids  # type: ignore[index]
    probe.source["constructor"] = "elsewhere"
    assert probe.source["constructor"] == "from_tokens"


@pytest.mark.parametrize("part", ["input_ids", "attention_mask", "label"])
def test_edits_in_place_are_noticed(part: str, tmp_path: Path) -> None:
    probe = small_probe()
    probe.verify()
    tensor = probe.labels["language"] if part == "label" else getattr(probe, part)
    tensor[0, 0] = 5 if part != "attention_mask" else False
    with pytest.raises(ProbeError, match="'small' was changed in place"):
        probe.verify()
    with pytest.raises(ProbeError, match="'small' was changed in place"):
        probe.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
def test_copies_for_other_processes_are_equal(duplicate: Any) -> None:
    probe = small_probe()
    other = duplicate(probe)
    other.verify()
    assert other.fingerprint == probe.fingerprint
    assert other.name == probe.name
    assert torch.equal(other.labels["language"], probe.labels["language"])


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_every_single_id_mask_and_label() -> None:
    ids, mask, label = torch.tensor(IDS), torch.tensor(RIGHT), torch.tensor(LABELS["language"])
    seen = {small_probe().fingerprint}
    changes = 0
    for b, s in torch.tensor(RIGHT).nonzero().tolist():
        other_ids, other_label = ids.clone(), label.clone()
        other_ids[b, s] += 1
        other_label[b, s] += 1
        seen.add(Probe.from_tokens(other_ids, mask, labels={"language": label}).fingerprint)
        seen.add(Probe.from_tokens(ids, mask, labels={"language": other_label}).fingerprint)
        changes += 2
    for b, length in enumerate([4, 3, 2]):
        other_mask = mask.clone()
        other_mask[b, length - 1] = 0
        seen.add(Probe.from_tokens(ids, other_mask, labels={"language": label}).fingerprint)
        changes += 1
    assert len(seen) == 1 + changes


def test_fingerprint_tells_padding_from_id_zero() -> None:
    assert Probe.from_tokens([[4, 0]]).fingerprint != Probe.from_tokens([[4, 0]], [[1, 0]]).fingerprint


def test_fingerprint_covers_shapes_and_label_names() -> None:
    variants = [
        Probe.from_tokens([[1, 2, 3, 4]]),
        Probe.from_tokens([[1, 2], [3, 4]]),
        Probe.from_tokens([[1], [2], [3], [4]]),
        Probe.from_tokens([[1, 2], [3, 4]], labels={"a": [[0, 0], [0, 0]]}),
        Probe.from_tokens([[1, 2], [3, 4]], labels={"b": [[0, 0], [0, 0]]}),
        Probe.from_tokens([[1, 2], [3, 4]], labels={"a": [[0, 0], [0, 0]], "b": [[0, 0], [0, 0]]}),
    ]
    assert len({probe.fingerprint for probe in variants}) == len(variants)


def test_fingerprint_ignores_padding_content_label_order_dtype_and_name() -> None:
    f, g = [[1, 1, 5]], [[2, 2, 6]]
    first = Probe.from_tokens([[7, 8, 9]], [[1, 1, 0]], labels={"f": f, "g": g}, name="one")
    second = Probe.from_tokens(
        torch.tensor([[7, 8, 50]], dtype=torch.int32),
        np.array([[True, True, False]]),
        labels={"g": [[2, 2, 0]], "f": [[1, 1, -1]]},
        name="two",
    )
    assert first.fingerprint == second.fingerprint
    assert list(first.labels) == list(second.labels) == ["f", "g"]
