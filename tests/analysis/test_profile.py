"""Layers of a model beside what chance and the document give."""

from __future__ import annotations

import pytest
from synthetic_runs import entry, measured, model

from ib_callback.analysis.profile import conclusion_of_profiles, layers_of, rows_of_profiles, table_of_profiles


def test_each_layer_has_its_chance_and_what_the_document_adds() -> None:
    first, second = layers_of(model(0.5, 0.25))
    assert (first.number, first.layer, second.number) == (1, "h.0", 2)
    assert (first.entropy, first.complexity, first.expressivity, first.ratio) == (0.75, 0.5, 0.25, 0.5)
    assert (first.complexity_null, first.expressivity_null, first.ratio_null) == (0.125, 0.0625, 0.5)
    # .25 less .125, and .125 less .0625.
    assert (first.complexity_document, first.expressivity_document) == (0.125, 0.0625)


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.embed_tokens", 0), ("transformer.wte", 0), ("gpt_neox.embed_in", 0), ("bert.embeddings", 0),
     ("model.layers.0", 1), ("transformer.h.0", 1), ("embedder.block", 1)],
)  # fmt: skip
def test_the_embedding_is_layer_0(name: str, number: int) -> None:
    assert [each.number for each in layers_of(model(0.5, 0.25, layers=(name, "x")))] == [number, number + 1]


def test_what_was_not_measured_by_layer_is_none() -> None:
    (layer,) = layers_of(measured(0, 0.0, 0.25))
    assert (layer.complexity_null, layer.ratio_null, layer.ratio, layer.complexity_document) == (None, None, None, None)
    assert "nothing can be concluded" in conclusion_of_profiles([entry("a", measured(0, 0.5, 0.25))])
    with pytest.raises(ValueError, match="--order"):
        layers_of(measured(0, 0.5, 0.25), ["bigram"])


def test_several_models_in_one_table() -> None:
    entries = [entry("a", model(0.5, 0.25)), entry("b", model(0.25, 0.125, layers=("embed", "h.0")))]
    rows = rows_of_profiles(entries)
    assert [(row["model"], row["number"]) for row in rows] == [("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    lines = table_of_profiles(entries, ["token"]).splitlines()
    assert len(lines) == 6
    numbers = ["0.7500", "0.2500", "0.1250", "0.1250", "0.1250", "0.0625", "0.0625", "0.5000", "0.5000"]
    assert lines[-1].split() == ["b", "token", "1", *numbers]
    assert "chance alone: 0.50 to 0.50" in conclusion_of_profiles(entries)
