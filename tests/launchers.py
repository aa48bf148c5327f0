"""What a process finds in its environment where others are started with it."""

import os

LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES",
)  # fmt: skip


def environment(**more):
    """Of a process that nobody started with others, but for what ``more`` says."""
    known = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {**known, "OMP_NUM_THREADS": "1", **more}
