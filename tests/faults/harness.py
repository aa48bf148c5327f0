"""Kill a command with SIGKILL (or stop it by SIGINT or SIGTERM) at random moments, start it again until it ends, and
compare all it wrote, bit for bit, with an undisturbed run.

A parent that has imported everything forks the children: each runs the command line's own ``main`` from its start, in a
folder of its own, and no kill is spent on the seconds that importing torch takes. Moments are uniform over the time
that the undisturbed run took. What is not compared: ``seconds`` and ``peak_rss_mib`` of a ``run.json``, and the columns
of a bench's tables that come from there; nothing else. Files that were left behind count as a fault.
"""

import contextlib
import csv
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SETTINGS = {
    "width": 16, "depth": 1, "heads": 2, "components": 4, "max_count": 63, "batch_size": 16, "max_epochs": 4,
    "validation_share": 0.2, "validate_every": 2, "linear_start": "false",
    "checkpoint_every_s": 0.1,
}  # fmt: skip
SET = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
RECIPE = """title: killed
sections: [SIM1, SIM2]
panel: clean
n_genes: 20
encoder: efficientnet_lite0
protocol: section
seeds: [2021]
methods:
  - {name: GenAR, model: genar, set: {linear_start: false}}
  - {name: ridge, model: ridge}
"""
ENCODER = "genar.bench.toy:narrow_encoder"
_FINISHED = "holds a finished run already"
_LONGEST_S = 300.0
_WORTH_ANOTHER = 4  # moments: to run once more undisturbed, now that everything is imported, times it better
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15, 143), signal.SIGINT: (130,)}
"""signal -> the codes by which a command ends that it stops"""
_MEASURED = ("seconds", "peak_rss", "training s", "peak MiB")


@dataclass(frozen=True)
class Command:
    """What is run, in a folder where ``tissue`` lies and what ``bring`` names of earlier commands' results."""

    name: str
    words: tuple[str, ...]
    out: str
    """the folder that it writes"""
    bring: tuple[str, ...] = ()
    signum: signal.Signals = signal.SIGKILL
    """by which it is stopped"""


COMMANDS = (
    Command("features", ("features", "tissue", "--out", "store", "--views", "1"), "store"),
    Command(
        "train",
        ("train", "tissue", "--test", "SIM2", "--out", "run", "--features", "run/store", "--n-genes", "20", "--encoder",
         ENCODER, "--samples", "2", *SET),
        "run",
    ),
    Command(
        "predict",
        ("predict", "tissue:SIM2", "--model", "run", "--features", "out/store", "--out", "out/counts.h5ad",
         "--encoder", ENCODER),
        "out", ("run",),
    ),
    Command("bench", ("bench", "recipe.yaml", "--out", "bench", "--toy"), "bench"),
    Command("fetch", ("fetch", "her2st", "--sections", "SPA119,SPA148", "--out", "data"), "data"),
)  # fmt: skip


@dataclass
class Found:
    """What became of one command."""

    seconds: float
    """of the undisturbed run"""
    moments: int = 0
    restarts: int = 0
    gone_on: int = 0
    """restarts that said that they go on within the training"""
    faults: list[str] = field(default_factory=list)


def check(command: Command, base: Path, n_moments: int, seed: int, say: Callable[[str], None]) -> Found:
    """Kill ``command`` at ``n_moments`` moments, up to three times on the way to one end, and compare every end.

    The undisturbed result stays in ``base`` for the commands that need it.
    """
    rng = random.Random(f"{command.name}-{seed}")
    expected, found = _undisturbed(command, base)
    _import(base / "modules.txt")
    if n_moments >= _WORTH_ANOTHER:
        again, found = _undisturbed(command, base)
        found.faults += [f"{command.name} run twice: {path} {why}" for path, why in differences(expected, again)]
    number = 0
    while found.moments < n_moments:
        number += 1
        folder = _folder(command, base, base / f"killed-{command.name}-{number}")
        _one_end(command, folder, expected, min(rng.choice((1, 1, 2, 3)), n_moments - found.moments), rng, found)
        shutil.rmtree(folder)
        say(f"{command.name}: {found.moments} of {n_moments} moments, {len(found.faults)} faults")
    return found


def _undisturbed(command: Command, base: Path) -> tuple[dict[str, bytes], Found]:
    folder = _folder(command, base, base / f"undisturbed-{command.name}")
    started = time.monotonic()
    code, log = _run(command, folder, None)
    found = Found(time.monotonic() - started)
    assert code == 0, f"{command.name}: the undisturbed run ended with {code}: {log}"
    shutil.copytree(folder / command.out, base / command.out, dirs_exist_ok=True)
    expected = contents(folder / command.out)
    (folder / "modules.txt").replace(base / "modules.txt")
    shutil.rmtree(folder)
    return expected, found


def _import(names: Path) -> None:
    """What a child has imported its later siblings find imported: no kill is spent on imports, either."""
    for name in names.read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _one_end(command: Command, folder: Path, expected: dict, n_kills: int, rng: random.Random, found: Found) -> None:
    killed = []
    for _ in range(n_kills):
        moment = rng.uniform(0, found.seconds)
        code, log = _run(command, folder, moment)
        if code not in ENDS[command.signum]:
            break  # it ended before
        killed.append(round(moment, 3))
        found.moments += 1
    code, log = _run(command, folder, None) if code in ENDS[command.signum] else (code, log)
    found.restarts += len(killed)
    found.gone_on += "going on after step" in log
    if code != 0 and not (code == 2 and _FINISHED in log):
        found.faults.append(f"{command.name} stopped at {killed} s: ended with {code}: {log.strip()[-600:]}")
    for path, why in differences(expected, contents(folder / command.out)):
        found.faults.append(f"{command.name} stopped at {killed} s: {path} {why}")


def _folder(command: Command, base: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "tissue").symlink_to(base / "tissue")
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in command.bring:
        (folder / name).symlink_to(base / name)
    return folder


def _run(command: Command, folder: Path, stop_after_s: float | None) -> tuple[int, str]:
    """Exit code (negative: the signal) and all that the command said."""
    log = folder / "log.txt"
    pid = os.fork()
    if pid == 0:
        _become(command, folder, log)
    signals = [(_LONGEST_S, signal.SIGKILL)]
    if stop_after_s is not None:
        signals.insert(0, (stop_after_s, command.signum))
    started = time.monotonic()
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if signals and time.monotonic() >= started + signals[0][0]:
            os.kill(pid, signals.pop(0)[1])
        time.sleep(0.002)
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(done[1]), said


def _become(command: Command, folder: Path, log: Path) -> None:
    """Of the forked child: be the command, and never return."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background hears none
        os.chdir(folder)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["genar", *command.words]
        from genar import cli

        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        Path("modules.txt").write_text("\n".join(name for name in list(sys.modules) if "__" not in name))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``, also a hidden one, as it is compared."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): _compared(path) for path in paths}


def _compared(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "run.json":
        facts = json.loads(data)
        return json.dumps({k: v for k, v in facts.items() if k not in ("seconds", "peak_rss_mib")}).encode()
    if path.suffix == ".csv":
        return _without_columns(list(csv.reader(io.StringIO(data.decode()))))
    if path.suffix == ".md" and b"| training s |" in data:
        lines = data.decode().partition("\nWhat each method saw")
        return lines[0].encode() + _without_columns([line.split(" | ") for line in lines[2].splitlines()[2:]])
    return data


def _without_columns(rows: list[list[str]]) -> bytes:
    """Without those of time and memory, by the names in the first row."""
    kept = [i for i, name in enumerate(rows[0] if rows else ()) if not name.startswith(_MEASURED)]
    return repr([[row[i] for i in kept] for row in rows if len(row) == len(rows[0])]).encode()


def differences(expected: dict[str, bytes], got: dict[str, bytes]) -> list[tuple[str, str]]:
    """Path and what is wrong with it."""
    wrong = [(path, "is missing") for path in sorted(expected.keys() - got.keys())]
    wrong += [(path, "was left behind") for path in sorted(got.keys() - expected.keys())]
    return wrong + [(p, "has other bytes") for p in sorted(expected.keys() & got.keys()) if expected[p] != got[p]]
