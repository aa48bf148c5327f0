"""The processes that share one training run: how many there are, and which of them this is.

torchrun and SLURM's srun start them and say so in the environment; otherwise Lightning starts those of one machine.
"""

import os
import threading
import time
from dataclasses import dataclass

from genar.errors import InputError


@dataclass(frozen=True)
class Group:
    """Processes by machine, and machines."""

    devices: int = 1
    num_nodes: int = 1
    by: str = ""
    """``torchrun``, ``srun``, or empty: nobody has started them yet"""

    @property
    def size(self) -> int:
        """All processes."""
        return self.devices * self.num_nodes


ALONE = Group()


def rank() -> int:
    """Number of this process, 0 for the one that writes and speaks; where machines were started by hand several others
    may share one (:func:`own_folder` tells them apart)."""
    if _torchrun():
        return int(os.environ["RANK"])
    if _srun():
        return int(os.environ["SLURM_PROCID"])
    if "WORLD_SIZE" in os.environ or _node():  # started by Lightning, or by hand on a machine beyond the first
        return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))
    return 0


def own_folder() -> str:
    """A name for this process's own files that no other of the run has; empty for the first."""
    if rank() == 0:
        return ""
    if by_launcher():
        return f"process{rank()}"
    return f"node{os.environ.get('NODE_RANK', 0)}-process{os.environ.get('LOCAL_RANK', 0)}"


def local_rank() -> int | None:
    """Number of this process among those of its machine; ``None`` where nobody numbered it."""
    number = os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if _srun() else None)
    return int(number) if number else None


def end_with_parent() -> None:
    """Have a process that Lightning started end when the first one does, also before they have met: until then it would
    wait for half an hour."""
    by_lightning = "WORLD_SIZE" in os.environ and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if not by_lightning or by_launcher():
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def group(devices: int | None = None, num_nodes: int | None = None) -> Group:
    """The processes of this run: as torchrun or srun started them, else ``devices`` (1 where not given) on
    ``num_nodes``.

    Raises ``InputError`` where what is asked for is not what was started, or below 1, or machines cannot find each
    other.
    """
    for option, asked in (("--devices", devices), ("--num-nodes", num_nodes)):
        if asked is not None and asked < 1:
            raise InputError(f"{option} must be at least 1, found {asked}")
    started = _started()
    if started is None:
        if (num_nodes or 1) > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= set(os.environ):
            raise InputError(
                f"--num-nodes {num_nodes}: set MASTER_ADDR and MASTER_PORT (of the first machine) and NODE_RANK "
                "(0, 1, …) on each machine, or start with torchrun or srun"
            )
        if _node() >= (num_nodes or 1):
            raise InputError(f"NODE_RANK is {_node()}, of {num_nodes or 1} machines; give --num-nodes, or unset it")
        return Group(devices or 1, num_nodes or 1)
    for option, asked, found in (
        ("--devices", devices, started.devices),
        ("--num-nodes", num_nodes, started.num_nodes),
    ):
        if asked is not None and asked != found:
            raise InputError(f"{option} {asked}: {started.by} started {found}; leave the option out, or start as many")
    return started


def by_launcher() -> bool:
    """Whether torchrun or srun started this process."""
    return _torchrun() or _srun()


def _started() -> Group | None:
    environ = os.environ
    if _torchrun():
        local = int(environ["LOCAL_WORLD_SIZE"])
        return Group(local, int(environ["WORLD_SIZE"]) // local, "torchrun")
    if _srun():
        tasks, nodes = _tasks(), int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES", 1))
        if tasks % nodes:
            raise InputError(f"srun started {tasks} tasks on {nodes} machines; start as many on each")
        return Group(tasks // nodes, nodes, "srun")
    return None


def _tasks() -> int:
    """Of this job step; those of the job where SLURM does not say so (an interactive shell is a step of one)."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", 1))


def _node() -> int:
    return int(os.environ.get("NODE_RANK", 0))


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_WORLD_SIZE" in os.environ


def _srun() -> bool:
    """Whether this is a task of a job step of several; a batch script outside of srun is no such task."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and _tasks() > 1


def srun_environment():
    """Lightning's view of the tasks that srun started: their number is that of the step, however it was asked for, and
    the job is not queued again by Lightning."""
    from pytorch_lightning.plugins.environments import SLURMEnvironment  # pyright: ignore

    class Srun(SLURMEnvironment):
        @staticmethod
        def _validate_srun_variables() -> None:
            """Any form of ``--ntasks`` will do."""

        def world_size(self) -> int:
            return _tasks()

        def validate_settings(self, num_devices: int, num_nodes: int) -> None:
            """They are :func:`group`'s."""

    return Srun(auto_requeue=False)
