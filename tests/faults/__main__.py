"""``python -m tests.faults [--moments 200] [--seed 0] [--signal KILL] [--only train,fetch] [--json FILE]``: exit code 1
where an end differs."""

import argparse
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from tests.faults import harness, source

HEAVY = ("torch", "pytorch_lightning", "timm", "h5py", "zarr", "matplotlib.figure", "huggingface_hub", "scipy.sparse")
OURS = (
    "genar.cli",
    "genar.runs",
    "genar.bench",
    "genar.bench.toy",
    "genar.fetch",
    "genar.features",
    "genar.data.simulate",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=harness.__doc__)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=[one.name.removeprefix("SIG") for one in harness.ENDS], default="KILL")
    parser.add_argument("--only", default=",".join(command.name for command in harness.COMMANDS))
    parser.add_argument("--side", type=int, default=8, help="spots along a side of the tissue")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return _check(options, Path(folder))


def _check(options: argparse.Namespace, base: Path) -> int:
    _be_small(base)
    server_pid = _serve(base, options.side)
    try:
        _import_all()
        found = {}
        for command, n_moments in _shares(options.moments, options.only.split(",")):
            command = replace(command, signum=signal.Signals[f"SIG{options.signal}"])
            found[command.name] = harness.check(command, base, n_moments, options.seed, _say)
    finally:
        os.kill(server_pid, 9)
        os.waitpid(server_pid, 0)
    facts = {"seed": options.seed, **{name: asdict(one) for name, one in found.items()}}
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    faults = [fault for one in found.values() for fault in one.faults]
    for name, one in found.items():
        times = f"stopped {one.moments} times, {one.gone_on} ends within training"
        _say(f"{name}: undisturbed {one.seconds:.1f} s, {times}")
    for fault in faults:
        _say(f"FAULT {fault}")
    _say(f"{sum(one.moments for one in found.values())} moments, {len(faults)} faults")
    return bool(faults)


def _shares(n_moments: int, wanted: list[str]) -> list[tuple[harness.Command, int]]:
    """The commands that are run: those wanted, each with its part of the moments, and those whose results they need."""
    shares = {name: n_moments // len(wanted) + (i < n_moments % len(wanted)) for i, name in enumerate(wanted)}
    makers = {command.out: command for command in harness.COMMANDS}
    needed = [makers[name].name for command in harness.COMMANDS if command.name in wanted for name in command.bring]
    return [(c, shares.get(c.name, 0)) for c in harness.COMMANDS if c.name in shares or c.name in needed]


def _be_small(base: Path) -> None:
    """One thread, and nothing of the user's own."""
    os.environ.update(
        OMP_NUM_THREADS="1", GENAR_FEATURES=str(base / "cache"), HF_HOME=str(base / "hub"), HF_TOKEN="ours",
        no_proxy="127.0.0.1,localhost",
    )  # fmt: skip
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT"):
        os.environ.pop(name, None)


def _serve(base: Path, side: int) -> int:
    """Simulate the tissue and serve it from a process of its own, as threads and forks do not go together."""
    from genar.data.simulate import TissueConfig, write_tissue

    write_tissue(
        base / "tissue",
        ("SIM1", "SIM2"),
        config=TissueConfig(n_rows=side, n_cols=side, n_genes=120, counts_per_nucleus=20),
    )
    server = source.make_server(source.files(base / "tissue"))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    pid = os.fork()
    if pid == 0:
        server.serve_forever()
    server.server_close()
    return pid


def _import_all() -> None:
    for name in (*HEAVY, *OURS):
        __import__(name)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
