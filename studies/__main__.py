"""Every table and figure of the studies.

python studies                                     # from the committed results, seconds; tables in results/tables.md
python studies --data FOLDER --work FOLDER --model smollm2=… --model gemma=…    # what is missing before: seven hours
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fine_tuning
import output_codebooks
import preference
import real_models
import rules
import sensitivity
import validation

STUDIES = (validation, output_codebooks, sensitivity, real_models, preference, fine_tuning, rules)
TABLES = Path(__file__).parent / "results" / "tables.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER[:FILE]", help="real ones")
    options = parser.parse_args()
    if options.data is not None:
        for study in (validation, output_codebooks, sensitivity, fine_tuning, rules):
            study.train(options.data, options.work)
        real_models.train(options.data, options.work, options.model)
        for model in options.model[:1]:
            preference.train(options.data, options.work, model)
    TABLES.write_text("\n".join(part for study in STUDIES for part in study.report()), encoding="utf-8")
    print(f"The tables are in {TABLES}.")


if __name__ == "__main__":
    main()
