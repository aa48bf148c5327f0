"""The machine that a run is made on: its memory, its clock, its versions."""

import ctypes
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from genar import processes
from genar.errors import InputError

_PACKAGES = (
    "torch",
    "pytorch-lightning",
    "timm",
    "anndata",
    "scanpy",
    "scikit-learn",
    "numpy",
    "zarr",
    "openslide-python",
)


def device(name: object) -> str:
    """The device of that name, or PyTorch's own; of ``auto`` the GPU where there is one, else the CPU. Of processes
    that share a machine each gets a GPU of its own. Raises ``InputError`` where there is none of that name."""
    import torch

    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (number := processes.local_rank()) is not None:
        name = f"cuda:{number}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise InputError(f"--device {name}: not to be had here ({reason}); expected auto, cpu, cuda or mps") from error
    return name


def of_models(device: str) -> str:
    """Where a model is trained and predicts: on ``device``, but for Apple's GPUs, which lack the float64 in which
    probabilities are added up."""
    return "cpu" if device.startswith("mps") else device


def check_devices(device: str, n: int) -> None:
    """``InputError`` where ``n`` processes of this machine cannot each have a GPU of their own."""
    import torch

    if device.startswith("cuda") and n > (there := torch.cuda.device_count()):
        raise InputError(
            f"--devices {n}: this machine has {there} GPU{'s' * (there != 1)}; --device cpu shares its cores instead"
        )


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of handing it back page by page: training on a CPU is up to several times
    faster."""
    mallopt = _of_libc("mallopt")
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 256 << 20)):
        mallopt(parameter, value)


def hand_back_memory() -> None:
    """Have glibc hand back at once what it has kept."""
    _of_libc("malloc_trim")(0)


def _of_libc(name: str):
    """A function of glibc, or one that does nothing where the system has another library."""
    if sys.platform.startswith("linux"):
        try:
            return getattr(ctypes.CDLL(None), name)
        except (OSError, AttributeError):
            pass
    return lambda *arguments: 0


def bf16_gain() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bf16.

    Measured (0.02 s), for the instructions say little: where the matrix unit is missing or hidden by a virtual machine,
    those for vectors may be slower than float32.
    """
    import torch

    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - started)
        seconds.append(min(times[1:]))
    return seconds[1] / seconds[0]


class Clock:
    """Seconds by stage, and the peak of resident memory since it was started, what earlier runs freed not counted."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()
        hand_back_memory()
        self._own_peak = _forget_peak()

    def peak_rss_mib(self) -> float | None:
        """MiB; ``None`` where the system knows the peak of the whole process alone."""
        if not self._own_peak:
            return None
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return round(int(status["VmHWM"].split()[0]) / 1024, 1)

    def lap(self, stage: str) -> None:
        """The stage that ends here."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 1)
        self._last = now


def _forget_peak() -> bool:
    """Have Linux count the process's peak of memory anew; whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or not allowed
        return False
    return True


def environment() -> dict:
    """Versions and the machine, for ``run.json``."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"python": platform.python_version(), **versions, **machine}
