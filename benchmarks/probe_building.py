"""Time and memory of building a probe at the paper's scale, 10,000 x 512 tokens, from a streamed file.

Each case runs in a process of its own, whose peak memory is compared: with a quarter of the sequences, and with a
dataset of twice as many rows, of which every other one is too short.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from _common import read_texts

COLUMNS = ("rows", "wall s", "CPU s", "before MiB", "peak MiB", "probe MiB", "save s", "load s")
DOCUMENT, SHORT = 3500, 1500  # characters; of English more and fewer than 512 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, help='.txt or .jsonl(.gz) with a "text" field; without: made-up words')
    parser.add_argument("--tokenizer", help="folder or name; without: the one that comes with the package")
    parser.add_argument("--num-sequences", type=int, default=10_000)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        build(Path(options.case[0]), int(options.case[1]), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        single, double = write_datasets(Path(folder), options.text, options.num_sequences)
        cases = [
            ("a quarter of the sequences", single, options.num_sequences // 4),
            ("all", single, options.num_sequences),
            ("all, of twice as many rows", double, options.num_sequences),
        ]
        columns = "".join(f"{column:>10}" for column in COLUMNS)
        print(f"{'case':<28}{columns}")
        for name, path, number in cases:
            command = [
                sys.executable,
                __file__,
                "--case",
                str(path),
                str(number),
                "--max-length",
                str(options.max_length),
            ]
            command += ["--tokenizer", options.tokenizer] if options.tokenizer else []
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{name:<28}"
                + "".join(f"{found[column]:>10,.{2 if column.endswith(' s') else 0}f}" for column in COLUMNS)
            )


def write_datasets(folder: Path, text: Path | None, number: int) -> tuple[Path, Path]:
    """Two files of JSON lines: documents, and the same documents with a short one after each."""
    # A tenth more than needed, for documents that turn out too short.
    pieces = cut(read_texts(text) if text else made_up(), number + number // 10)
    paths = folder / "single.jsonl", folder / "double.jsonl"
    with open(paths[0], "w") as single, open(paths[1], "w") as double:
        for document, short in pieces:
            single.write(json.dumps({"text": document}) + "\n")
            double.write(json.dumps({"text": document}) + "\n" + json.dumps({"text": short}) + "\n")
    return paths


def cut(texts: Iterator[str], most: int) -> Iterator[tuple[str, str]]:
    for text in texts:
        for start in range(0, len(text) - DOCUMENT - SHORT, DOCUMENT + SHORT):
            if most == 0:
                return
            most -= 1
            yield text[start : start + DOCUMENT], text[start + DOCUMENT : start + DOCUMENT + SHORT]


def made_up() -> Iterator[str]:
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(random.choice(letters, n)) for n in random.integers(1, 9, 5000)])
    while True:
        yield " ".join(words[np.minimum(random.zipf(1.3, 20_000) - 1, len(words) - 1)])


def build(path: Path, number: int, options: argparse.Namespace) -> None:
    import ib_callback as ib
    from ib_callback.probe import builtin_text

    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = builtin_text.default_tokenizer()
    import datasets  # noqa: F401 - what it takes by itself is no part of building

    before, started, cpu = peak(), time.perf_counter(), seconds()
    probe = ib.Probe.from_dataset(
        path, tokenizer, num_sequences=number, max_length=options.max_length, min_length=options.max_length, cache=False
    )
    found = {
        "wall s": time.perf_counter() - started,
        "CPU s": seconds() - cpu,
        "before MiB": before,
        "peak MiB": peak(),
    }
    file = path.with_name("probe.safetensors")
    started = time.perf_counter()
    probe.save(file)
    found["save s"] = time.perf_counter() - started
    started = time.perf_counter()
    ib.Probe.load(file)
    found["load s"] = time.perf_counter() - started
    found |= {"rows": int(probe.source["texts_read"]), "probe MiB": probe.input_ids.numel() * 9 / 2**20}
    print(json.dumps(found))


def peak() -> float:
    """Most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def seconds() -> float:
    """Processor time so far, of all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
