"""The processes that share one training run: how many there are, and which of them this is.

torchrun and SLURM's srun start them and say so in the environment; otherwise Lightning starts those of one machine.
"""

import os
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
    """Number of this process, 0 for the one that writes and speaks; of a machine beyond the first it may be any other
    than 0."""
    if _torchrun():
        return int(os.environ["RANK"])
    if _srun():
        return int(os.environ["SLURM_PROCID"])
    if "WORLD_SIZE" in os.environ:  # started by Lightning
        return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))
    return 0


def group(devices: int | None = None, num_nodes: int | None = None) -> Group:
    """The processes of this run: as torchrun or srun started them, else ``devices`` (1 where not given) on
    ``num_nodes``.

    Raises ``InputError`` where what is asked for is not what was started, or below 1.
    """
    for option, asked in (("--devices", devices), ("--num-nodes", num_nodes)):
        if asked is not None and asked < 1:
            raise InputError(f"{option} must be at least 1, found {asked}")
    started = _started()
    if started is None:
        return Group(devices or 1, num_nodes or 1)
    for option, asked, found in (
        ("--devices", devices, started.devices),
        ("--num-nodes", num_nodes, started.num_nodes),
    ):
        if asked is not None and asked != found:
            raise InputError(f"{option} {asked}: {started.by} started {found}; leave the option out, or start as many")
    return started


def _started() -> Group | None:
    environ = os.environ
    if _torchrun():
        local = int(environ["LOCAL_WORLD_SIZE"])
        return Group(local, int(environ["WORLD_SIZE"]) // local, "torchrun")
    if _srun():
        nodes = int(environ.get("SLURM_NNODES", 1))
        return Group(int(environ["SLURM_NTASKS"]) // nodes, nodes, "srun")
    return None


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_WORLD_SIZE" in os.environ


def _srun() -> bool:
    """Whether this is a task of a job step of several; a batch script outside of srun is no such task."""
    environ = os.environ
    return "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1
