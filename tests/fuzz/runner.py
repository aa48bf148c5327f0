"""Run cases in child processes that may crash, hang or swell; say which did.

A child takes case after case of one target and tells its parent of each. Where it dies, a signal is the finding; where
one case takes more than ``SECONDS`` of the processor, or the child's memory rises by more than ``BYTES``, that is.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch

from genar.errors import InputError

from .mutate import change_folder, fresh
from .targets import TARGETS

SECONDS, BYTES = 10.0, 1 << 30
_WORN = 77
_ASLEEP = 60.0  # of the clock, where it waits for something rather than computes
_MAKING = 100.0  # of the processor, to damage the files of a case
_GUARD = 3 << 30  # beyond this the system refuses: the machine must outlive a case


@dataclass(frozen=True)
class Finding:
    """A case that was not answered as it should be."""

    target: str
    case: int
    what: str
    """``exception``, ``crash``, ``hang``, ``memory``"""
    told: str
    damage: str


@dataclass
class Count:
    """What became of the cases of a target."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    largest_mib: float = 0.0


def damaged(target: str, case: int, seeds: Path, work: Path) -> str:
    """Write the input of a case into ``work``: the same at every call. Case 0 is the undamaged seed."""
    fresh(seeds / target, work)
    return change_folder(work, Random(f"{target}:{case}")) if case else ""


def run_case(target: str, work: Path) -> str:
    """``accepted``, or the refusal; what is neither comes out as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[target].enter(work)
    except InputError as error:
        told = str(error)
        assert told.strip(), "an empty message"
        return f"refused: {told}"
    return "accepted"


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _child(target: str, first: int, seeds: str, work: str, pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)  # a pool of threads that the parent had is not here, and would be waited for
    log = os.open(os.devnull, os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _GUARD, used + _GUARD))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    case = first
    while True:
        try:
            damage = damaged(target, case, Path(seeds), Path(work))
        except MemoryError:  # what earlier cases left takes what this process may have
            os._exit(_WORN)
        pipe.send(("start", case, damage))
        before, started = _forget_peak(), time.process_time()
        try:
            told = run_case(target, Path(work))
        except BaseException as error:
            at = [frame for frame in traceback.extract_tb(error.__traceback__) if "genar" in frame.filename]
            place = f"{Path(at[-1].filename).name}:{at[-1].lineno}" if at else "?"
            told = f"exception: {type(error).__name__}: {str(error)[:300]} at {place}"
        pipe.send(("end", told, time.process_time() - started, _peak() - before))
        case += 1


class Child:
    """A running child and what it is at."""

    def __init__(self, target: str, first: int, seeds: Path, work: Path):
        self.target, self.first = target, first
        self.pipe, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        words = (target, first, str(seeds), str(work), theirs)
        self.process = multiprocessing.get_context("fork").Process(target=_child, args=words, daemon=True)
        self.process.start()
        theirs.close()

    def _stat(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()

    def cpu_s(self) -> float:
        fields = self._stat()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def waits_for_a_core(self) -> bool:
        return self._stat()[0] == "R"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run_target(
    target: str, seeds: Path, work: Path, *, first: int, until: float, count: Count
) -> tuple[list[Finding], int]:
    """Cases from ``first`` on until the clock says ``until``; the findings, and the next case."""
    found, case = [], first
    while time.monotonic() < until:
        child = Child(target, case, seeds, work)
        try:
            finding, case = _watch(child, case, until, count)
        finally:
            child.stop()
        found += finding
    return found, case


def _watch(child: Child, case: int, until: float, count: Count) -> tuple[list[Finding], int]:
    damage, begun = "", False
    found: list[Finding] = []
    while True:
        started, cpu = time.monotonic(), child.cpu_s()
        while not child.pipe.poll(0.2):
            spent = child.cpu_s() - cpu
            if child.waits_for_a_core():  # other work may keep it from one
                started = time.monotonic()
            limit = SECONDS if begun else _MAKING  # it damages the files still: gigabytes of text are packed
            if spent > limit or time.monotonic() - started > _ASLEEP:
                if not begun:
                    return found, case + 1
                return [*found, Finding(child.target, case, "hang", f"after {spent:.0f} s", damage)], case + 1
        try:
            word, *facts = child.pipe.recv()
        except (EOFError, OSError):
            child.process.join()
            if child.process.exitcode == _WORN and case > child.first:
                return found, case
            if not begun:  # the library that should damage the file broke on it: no case for us
                return found, case + 1
            return [*found, Finding(child.target, case, "crash", f"exit {child.process.exitcode}", damage)], case + 1
        begun = word == "start"
        if begun:
            case, damage = facts
            continue
        told, seconds, more = facts
        count.cases += 1
        count.accepted += told == "accepted"
        count.refused += told.startswith("refused")
        count.slowest_s, count.largest_mib = max(count.slowest_s, seconds), max(count.largest_mib, more / 2**20)
        if told.startswith("exception"):
            found.append(Finding(child.target, case, "exception", told, damage))
        if more > BYTES:
            found.append(Finding(child.target, case, "memory", f"{more / 2**20:.0f} MiB ({told[:80]})", damage))
        case += 1
        if time.monotonic() > until:
            return found, case


def run_all(names, seeds: Path, work: Path, seconds: float, *, first: int = 1, turn_s: float = 5.0, say=print):
    """Share the time among the targets, turn by turn; the findings and the counts by target."""
    counts, findings, nexts = {name: Count() for name in names}, [], dict.fromkeys(names, first)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0.5:
        share = min(turn_s, left / len(names))
        for turn, name in enumerate(names):
            until = time.monotonic() + min(share, (end - time.monotonic()) / (len(names) - turn))
            found, nexts[name] = run_target(
                name, seeds, work / name, first=nexts[name], until=until, count=counts[name]
            )  # fmt: skip
            findings += found
            for finding in found:
                say(json.dumps(asdict(finding)))
        if share < turn_s:
            break
    return findings, counts


def make_seeds(folder: Path, names) -> Path:
    """The seeds of the targets, written anew."""
    for name in names:
        (folder / name).mkdir(parents=True)
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            TARGETS[name].seed(folder / name)
    return folder
