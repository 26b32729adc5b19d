"""The validation study: training runs on which every quantity is held against held-out loss (README.md has the plan).

python studies/validation.py --data FOLDER --work FOLDER       # trains what is missing: some four hours on one core
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _runs import Config, run_all

RESULTS = Path(__file__).parent / "results" / "validation"

_SIZES: dict[str, dict[str, Any]] = {
    "llama_2x64": {"architecture": "llama", "layers": 2, "width": 64, "rate": 2e-3},
    "llama_4x128": {"architecture": "llama", "layers": 4, "width": 128},
    "llama_4x128_untied": {"architecture": "llama", "layers": 4, "width": 128, "tied": False},
    "llama_6x192": {"architecture": "llama", "layers": 6, "width": 192, "heads": 6},
    "gpt2_2x64": {"architecture": "gpt2", "layers": 2, "width": 64, "rate": 2e-3, "tied": False},
    "gpt2_3x96": {"architecture": "gpt2", "layers": 3, "width": 96, "tied": False},
    "gpt2_4x128_tied": {"architecture": "gpt2", "layers": 4, "width": 128},
}


def _run(size: str, kind: str = "", *, seed: int = 1, **changes: Any) -> Config:
    name = "_".join(filter(None, (size, kind, f"s{seed}")))
    return Config(name, seed=seed, **({"steps": 1500, "halves": True} | _SIZES[size] | changes))


def _overfit(size: str, sequences: int, steps: int) -> Config:
    return _run(size, f"overfit_{sequences}", sequences=sequences, steps=steps, schedule="constant")


# Those that decide most come first.
RUNS = [
    _run("gpt2_3x96"),
    _overfit("gpt2_3x96", 160, 300),
    _run("llama_4x128"),
    _overfit("llama_4x128", 1000, 700),
    _run("llama_2x64", steps=2000),
    _run("gpt2_2x64", steps=2000),
    _overfit("gpt2_3x96", 1000, 700),
    _overfit("llama_4x128", 160, 300),
    _run("gpt2_4x128_tied"),
    _run("llama_4x128_untied", steps=1000),
    _run("llama_4x128", "spike", schedule="spike", steps=800),
    _run("gpt2_3x96", "wsd", schedule="wsd", steps=800),
    _run("llama_2x64", "warmup", warmup=500, steps=1000),
    _overfit("gpt2_4x128_tied", 400, 500),
    _overfit("llama_4x128_untied", 400, 500),
    _run("llama_2x64", seed=2, steps=1000),
    _run("gpt2_2x64", seed=2, steps=1000),
    _run("llama_4x128", seed=2, steps=800),
    _run("gpt2_3x96", seed=2, steps=800),
    _run("llama_6x192", steps=800),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    run_all([run for run in RUNS if options.only in run.name], options.data, options.work, RESULTS)


if __name__ == "__main__":
    main()
