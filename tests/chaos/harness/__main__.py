"""``scripts/chaos``: every fault in every phase, a table, and exit status 1 on a breach."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.chaos.harness.report import Row, table, write_json
from tests.chaos.harness.run import all_cases, runner


def main() -> int:
    arguments = _parse()
    chosen = all_cases(quick=arguments.quick, only=arguments.only)
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        print(f"no case has {arguments.only!r} in its name; see --list", file=sys.stderr)
        return 2
    rows: list[Row] = []
    try:
        with runner() as run:
            for number, case in enumerate(chosen, 1):
                started = time.monotonic()
                row = run(case)
                rows.append(row)
                verdict = "skipped" if row.skipped else "BREACH" if row.breaches else "ok"
                took_s = time.monotonic() - started
                progress = f"[{number}/{len(chosen)}] {verdict:7} {row.name}  {took_s:.1f} s"
                print(progress, file=sys.stderr, flush=True)
    finally:
        # Also of a run that was interrupted, or that the harness itself has broken.
        print(table(rows))
        if arguments.json:
            write_json(arguments.json, rows)
    return 1 if any(row.breaches for row in rows) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the version of the test suite")
    parser.add_argument("--only", default="", metavar="NAME", help="cases with NAME in theirs")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
