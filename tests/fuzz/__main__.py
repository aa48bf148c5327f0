"""``python -m tests.fuzz``: every door for some minutes, or one case again."""

import argparse
import collections
import sys
import tempfile
import time
import warnings
from pathlib import Path

from .runner import damaged, make_seeds, run_all, run_case
from .targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; repeatable")
    parser.add_argument("--first", type=int, default=1, help="number of the first case of each target")
    parser.add_argument("--case", type=int, help="this case alone, in this process, with its traceback")
    parser.add_argument("--keep", type=Path, help="with --case: leave the damaged files in this folder")
    asked = parser.parse_args()
    names = asked.target or list(TARGETS)
    with tempfile.TemporaryDirectory(prefix="genar-fuzz-") as folder:
        seeds, work = make_seeds(Path(folder) / "seeds", names), Path(folder) / "work"
        work.mkdir()
        if asked.case is not None:
            place = asked.keep or work / names[0]
            print(damaged(names[0], asked.case, seeds, place) or "undamaged")
            print(run_case(names[0], place))
            return 0
        started = time.monotonic()
        findings, counts = run_all(names, seeds, work, 60 * asked.minutes, first=asked.first)
    print(
        f"\n{'target':<14}{'cases':>8}{'refused':>9}{'accepted':>10}{'slowest s':>11}{'MiB more':>10}{'findings':>10}"
    )
    for name, count in counts.items():
        n = sum(finding.target == name for finding in findings)
        print(
            f"{name:<14}{count.cases:>8}{count.refused:>9}{count.accepted:>10}{count.slowest_s:>11.1f}{count.largest_mib:>10.0f}{n:>10}"
        )
    kinds = collections.Counter(finding.what for finding in findings)
    total = sum(count.cases for count in counts.values())
    print(f"{total} cases in {time.monotonic() - started:.0f} s; findings: {dict(kinds) or 'none'}")
    return 1 if findings else 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        sys.exit(main())
