from __future__ import annotations

import pytest

from ib_callback.checkpoints.names import Said, said_by, stage_of_repository, thinned


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("step143000", Said(143_000)),
        ("step0", Said(0)),
        ("step150-tokens1B", Said(150, 10**9)),
        ("stage1-step1000-tokens5B", Said(1000, 5 * 10**9, "stage1")),
        ("stage2-ingredient3-step23852-tokens51B", Said(23852, 51 * 10**9, "stage2-ingredient3")),
        ("step1000-tokens2.5B", Said(1000, 25 * 10**8)),
        ("step10-tokens500M", Said(10, 5 * 10**8)),
        ("checkpoint-300", Said(300)),
        ("kept-checkpoint-300", Said(300)),
        ("epoch=0-step=500", Said(500)),
        ("iter_0010000", Said(10_000)),
        ("global_step20", Said(20)),
        ("tokens-2T", Said(tokens=2 * 10**12)),
        ("main", Said()),
        ("v1.0", Said()),
        ("12B", Said()),
        ("footstep5", Said()),
    ],
)
def test_names_of_checkpoints(name, said):
    assert said_by(name) == said


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("allenai/OLMo-2-1124-7B-SFT", "sft"), ("allenai/OLMo-2-1124-7B-DPO", "dpo"), ("google/gemma-3-270m-it", "it"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "instruct"), ("EleutherAI/pythia-14m-seed1", None),
        ("EleutherAI/pythia-14m", None), ("made/split", None),
    ],
)  # fmt: skip
def test_post_training_is_at_the_end_of_a_name(name, stage):
    assert stage_of_repository(name) == stage


PYTHIA = [0, *(2**k for k in range(10)), *range(1000, 144_000, 1000)]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 10, 20, 50, 153])
def test_thinned_steps_are_as_many_as_asked_for_with_both_ends(most):
    kept = sorted(thinned(PYTHIA, most))
    assert len(kept) == most
    assert kept[-1] == 143_000
    assert (kept[0] == 0) == (most > 1)
    assert set(kept) <= set(PYTHIA)


def test_thinned_steps_are_even_on_a_logarithmic_axis():
    assert sorted(thinned(range(1, 1001), 4)) == [1, 10, 100, 1000]
    assert sorted(thinned(range(1025), 6)) == [0, 1, 6, 32, 181, 1024]  # 1024 ** (i / 4): 5.66, 32, 181.02
    assert thinned([5, 7, 9], 3) == thinned([5, 7, 9], None) == {5, 7, 9}
    assert thinned([], 3) == set()
