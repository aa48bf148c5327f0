"""Memory and open files of one process that predicts section after section, as `genar predict` does each.

    python benchmarks/soak.py                        200 small simulated sections
    python benchmarks/soak.py --minutes 30           as many as fit into the time
    python benchmarks/soak.py --spots 400            larger ones

Each section is simulated, embedded with the default encoder, predicted, written, and its files deleted. The slope is
that of the resident memory over the sections, by least squares; the first tenth, in which caches fill, is left out.
Exit code 1 where it is 1 MiB a section or more, or where the files that are open grow in number.
"""

import argparse
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from genar import cli, machine
from genar.data.simulate import TissueConfig, write_tissue

LIMIT_MIB = 1.0
TINY = ("width=32", "depth=1", "heads=2", "max_count=63", "max_epochs=1", "linear_start=false")


def command(*words):
    """Run a command line in this process, as the program does."""
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            cli.app([str(word) for word in words], standalone_mode=False)
        finally:
            sys.stdout = stdout


def resident_mib():
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(n_sections, minutes, spots, encoder, say=print):
    """(resident MiB, open files) after each section."""
    side = math.ceil(math.sqrt(spots))
    config = TissueConfig(n_rows=side, n_cols=side, n_genes=120)
    seen, ends = [], time.monotonic() + 60 * minutes if minutes else math.inf
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        base = Path(folder)
        write_tissue(base / "tissue", ("TRAIN",), config=config)
        settings = [word for setting in TINY for word in ("--set", setting)]
        how = ("--encoder", encoder, "--views", "1", "--features", base / "store", "--n-genes", "50", *settings)
        command("train", base / "tissue", "--out", base / "run", *how)
        while len(seen) < n_sections and time.monotonic() < ends:
            one = base / "one"
            write_tissue(one, (f"S{len(seen)}",), config=config)
            section, out = f"{one}:S{len(seen)}", one / "counts.h5ad"
            where = ("--encoder", encoder, "--features", one / "store", "--out", out)
            command("predict", section, "--model", base / "run", *where)
            assert out.stat().st_size > 0
            shutil.rmtree(one)
            gc.collect()
            seen.append((resident_mib(), len(os.listdir("/proc/self/fd"))))
            if len(seen) % 20 == 0:
                say(f"{len(seen)} sections: {seen[-1][0]:.0f} MiB, {seen[-1][1]} open files")
    return seen


def judge(seen):
    """Facts: slope in MiB a section, and the open files at the start and at the end of what counts."""
    counted = seen[len(seen) // 10 :]
    memory, handles = np.array(counted).T
    slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0])
    return {
        "sections": len(seen), "mib_first": memory[0], "mib_last": memory[-1], "mib_per_section": round(slope, 4),
        "open_files_first": int(handles[0]), "open_files_most": int(handles.max()),
        "ok": bool(slope < LIMIT_MIB and handles.max() <= handles[0]),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=200)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="stop after so many; sections then are as many as fit"
    )
    parser.add_argument("--spots", type=int, default=36)
    parser.add_argument("--encoder", default="efficientnet_lite0")
    options = parser.parse_args()
    machine.keep_freed_memory()
    n_sections = sys.maxsize if options.minutes else options.sections
    started = time.monotonic()
    facts = judge(soak(n_sections, options.minutes, options.spots, options.encoder))
    print(json.dumps({**facts, "minutes": round((time.monotonic() - started) / 60, 1)}, indent=1))
    return 0 if facts["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
