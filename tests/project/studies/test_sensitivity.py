"""The tables of the sensitivity study come from the committed results alone."""

from __future__ import annotations

import sensitivity


def test_every_run_and_candidate_is_in_the_tables() -> None:
    text = "\n".join(sensitivity.report())
    assert "nan" not in text
    for name in sensitivity.RUNS:
        assert f"All settings: {name}" in text
    for candidate in sensitivity.CANDIDATES:
        assert text.count(f"| {candidate} |") == len(sensitivity.RUNS) + 2
