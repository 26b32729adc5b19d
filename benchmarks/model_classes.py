"""Every class of transformers' MODEL_FOR_CAUSAL_LM_MAPPING at tiny size: measured rightly, or refused, and why.

A class is measured if `Meter.preflight` passes with all defaults, which compares the layers that are measured with the
hidden states that the model returns. A refusal that names `layers=` is tried with these. With `--write docs/models.md`
the table between the two marks of that file is written anew.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import ib_callback as ib
from ib_callback.measuring.model import crosscheck

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from architectures import causal_classes, tiny_model

BEGIN, END = "<!-- swept: begin -->", "<!-- swept: end -->"
MEASURED, UNCHECKED, REFUSED, FAILED, UNBUILT = (
    "measured",
    "measured, returns no hidden states to compare with",
    "refused",
    "does not run on text alone",
    "not built at tiny size",
)


@dataclass(frozen=True)
class Row:
    """What became of a class: `layers` that are measured, `reason` of a refusal, `cure` and whether it `works`."""

    name: str
    outcome: str
    layers: str = ""
    reason: str = ""
    cure: str = ""
    works: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """The columns of the table."""
        cure = "" if not self.cure else f"`layers={self.cure}`{'' if self.works else ' (does not work)'}"
        return f"`{self.name}`", self.outcome, self.layers, self.reason, cure


def sweep(name: str, config: type, kind: type, probe: ib.Probe) -> Row:
    """What becomes of one class."""
    torch.manual_seed(0)
    try:
        model = tiny_model(config, kind).eval()
    except Exception as error:
        return Row(name, UNBUILT, reason=one_line(error))
    compared: list[bool] = []
    check = crosscheck.check_hidden_states
    crosscheck.check_hidden_states = lambda *given, **named: compared.append(check(*given, **named))  # type: ignore
    try:
        layers = ib.Meter(probe).preflight(model).layers
        told = f"`{layers[0]}` … `{layers[-1]}` ({len(layers)})"
        return Row(name, MEASURED if any(compared) else UNCHECKED, told)
    except ib.ModelError as error:
        found = re.findall(r"layers=(\[[^\]]*'[^\]]*'\])(?:, which| measures)", str(error))
        cure = found[-1] if found else ""
        return Row(name, REFUSED, reason=one_line(error), cure=cure, works=works(model, probe, cure) if cure else None)
    except Exception as error:
        return Row(name, FAILED, reason=one_line(error))
    finally:
        crosscheck.check_hidden_states = check


def works(model: Any, probe: ib.Probe, cure: str) -> bool:
    """Whether the model is measured with the layers that its refusal names."""
    try:
        ib.Meter(probe, layers=ast.literal_eval(cure)).preflight(model)
    except Exception:
        return False
    return True


def one_line(error: Exception, most: int = 700) -> str:
    """The error in a cell of a table."""
    text = re.sub(r"\s+", " ", str(error)).replace("|", r"\|")
    text = f"{'' if isinstance(error, ib.ModelError) else type(error).__name__ + ': '}{text}"
    return text if len(text) <= most else f"{text[:most]}…"


def table(rows: list[Row]) -> str:
    """Refusals first, with their reasons; then those that are measured."""
    lines = [f"Swept with transformers {transformers.__version__}: {summary(rows)}.", ""]
    left = [row for row in rows if row.outcome not in (MEASURED, UNCHECKED)]
    lines += ["| class | outcome | reason | cure |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell for i, cell in enumerate(row.cells()) if i != 2)} |" for row in left]
    lines += ["", "| class | outcome | layers |", "|---|---|---|"]
    lines += [f"| {' | '.join(row.cells()[:3])} |" for row in rows if row not in left]
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """How many classes there are of each outcome."""
    number = Counter(row.outcome for row in rows)
    return f"{len(rows)} classes: " + ", ".join(f"{count} {outcome}" for outcome, count in number.most_common())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="names of classes of models")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file with the marks of the table")
    options = parser.parse_args(arguments)
    if options.only and options.write:
        parser.error("--write is for the whole table, without --only")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    ids = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    probe = ib.Probe.from_tokens(ids)
    rows = []
    for config, kind in causal_classes():
        if not options.only or kind.__name__ in options.only:
            rows.append(sweep(kind.__name__, config, kind, probe))
            print(*filter(None, rows[-1].cells()), sep=" | ", flush=True)
    print(summary(rows))
    if options.write:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    if any(row.works is False for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
