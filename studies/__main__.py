"""Every table and figure of the studies.

python studies                                     # from the committed results, seconds; tables in results/tables.md
python studies --data FOLDER --work FOLDER         # trains what is missing before: README.md has the hours
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fine_tuning
import output_codebooks
import preference
import real_models
import sensitivity
import validation

STUDIES = (validation, output_codebooks, sensitivity, real_models, preference, fine_tuning)
TABLES = Path(__file__).parent / "results" / "tables.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing")
    parser.add_argument("--work", type=Path, default=Path("study-work"))
    options = parser.parse_args()
    if options.data is not None:
        for study in STUDIES:
            study.train(options.data, options.work)
    TABLES.write_text("\n".join(part for study in STUDIES for part in study.report()), encoding="utf-8")
    print(f"The tables are in {TABLES}.")


if __name__ == "__main__":
    main()
