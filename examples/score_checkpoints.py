"""Score the checkpoints of a finished run, without training anything.

    python examples/hf_trainer.py && python examples/score_checkpoints.py ib_example

A folder with `checkpoint-<step>` folders, as HuggingFace's Trainer writes them, becomes a table and a trajectory file.
The probe is the built-in text, or documents of your own: a text file with an empty line between them.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ib_callback as ib


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint, in the order of training."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in numbered if match)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds checkpoint-<step> folders with model and tokenizer")
    parser.add_argument("--texts", type=Path, help="documents to measure on, with an empty line between them")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=64)
    options = parser.parse_args()

    found = checkpoints(options.folder)
    if not found:
        parser.error(f"no checkpoint-<step> folders in {options.folder}")
    tokenizer = AutoTokenizer.from_pretrained(found[0][1])
    size = {"num_sequences": options.sequences, "max_length": options.max_length}
    if options.texts is None:
        probe = ib.Probe.builtin(tokenizer, **size)
    else:
        probe = ib.Probe.from_texts(options.texts.read_text(encoding="utf-8").split("\n\n"), tokenizer, **size)

    meter = ib.Meter(probe, progress=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trajectory = ib.Trajectory()
    for step, path in found:
        model = AutoModelForCausalLM.from_pretrained(path).to(device)
        trajectory.append(meter.measure(model, step=step))
        print(trajectory[-1])

    print()
    print(trajectory.table())
    file = options.folder / "ib_checkpoint_scores.jsonl"
    trajectory.save(file)
    print(f"\nWritten to {file}")


if __name__ == "__main__":
    main()
