from __future__ import annotations

import numpy as np
import pytest
from plot_runs import artist, artists, labels, legend_texts, nothing_overlaps
from synthetic_runs import entry, measured, model

from ib_callback.analysis.profile import rows_of_profiles
from ib_callback.plot.profile import layer_profile


def test_information_by_layer_with_chance_and_document() -> None:
    trained, untrained = entry("trained", model(0.5, 0.25)), entry("untrained", model(0.25, 0.25))
    models = {each.name: rows_of_profiles([each]) for each in (trained, untrained)}
    figure = layer_profile(models, notes=["small"], theme="dark")
    information, output, ratio, entropy = figure.axes
    first, second = artists(information, "complexity")
    assert list(first.get_xdata()) == [1, 2]
    assert list(first.get_ydata()) == [0.5, 0.5]
    assert first.get_linestyle() != second.get_linestyle()
    # Chance up to the null, .125; from there to the document baseline, .25.
    chance, document = (artists(information, name)[0].get_paths()[0].vertices[:, 1] for name in ("chance", "document"))
    assert (chance.min(), chance.max(), document.min(), document.max()) == (0, 0.125, 0.125, 0.25)
    assert list(artists(ratio, "null")[0].get_ydata()) == [0.5, 0.5]
    assert list(artists(output, "expressivity")[0].get_ydata()) == [0.25, 0.25]
    assert list(artists(entropy, "entropy")[1].get_ydata()) == [0.75, 0.75]
    assert artist(ratio, "bound").get_ydata()[0] == 1
    bands = {"chance band: up to the null", "document band: null to document baseline"}
    assert {"trained", "untrained", *bands} <= {*legend_texts(figure)}
    # The bands of both models can be told apart where they overlap.
    assert len({band.get_hatch() for band in artists(information, "chance")}) == 2
    nothing_overlaps(figure)


def test_the_embedding_is_at_0_and_a_missing_null_is_not_drawn() -> None:
    rows = rows_of_profiles([entry("a", model(0.5, 0.25, layers=("embed_tokens", "h.0")))])
    figure = layer_profile({"a": rows, "b": rows_of_profiles([entry("b", measured(0, 0.5, 0.25))])})
    assert list(artists(figure.axes[0], "complexity")[0].get_xdata()) == [0, 1]
    assert len(artists(figure.axes[0], "null")) == 1
    nothing_overlaps(figure)
    with pytest.raises(ValueError, match="at least one layer"):
        layer_profile({})


def test_orders_stand_side_by_side_on_one_scale() -> None:
    rows = rows_of_profiles([entry("a", model(0.5, 0.25))])
    wider = [{**row, "order": "bigram", "complexity": 0.75} for row in rows]
    figure = layer_profile({"a": [*rows, *wider]})
    assert len(figure.axes) == 7
    assert np.all(figure.axes[0].get_ylim() == figure.axes[1].get_ylim())
    assert "entropy" in labels(figure.axes[-1])
    nothing_overlaps(figure)
