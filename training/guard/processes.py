"""How many processes were launched, and whether they know of each other."""

import os

SIZES = (
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which torchrun, srun and mpirun pass the number of processes, and the number of this one."""


def check_processes(known: int = 1) -> None:
    """Check that this process knows of all processes that were launched with it.

    Args:
        known: number of processes that it works with.

    Raises:
        ValueError: if there are more. Each of them would do all the work, and write to the same files.
    """
    name, count = _largest(SIZES)
    if count > 1 and known == 1:
        raise ValueError(
            f"{count} processes were launched that do not know of each other: on the CPU use accelerate launch --cpu, "
            f"or set ACCELERATE_USE_CPU=true. For one process unset {name}"
        )


def is_first() -> bool:
    """Test whether this is the first of the processes that were launched together."""
    return _largest(RANKS)[1] == 0


def _largest(names: tuple[str, ...]) -> tuple[str, int]:
    """Return the variable with the largest whole number, and this number; 0 if there is none."""
    found = {name: int(value) for name in names if (value := os.environ.get(name, "")).isdigit()}
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:  # sbatch runs its script once
        found = {name: value for name, value in found.items() if not name.startswith("SLURM")}
    name = max(found, key=lambda each: found[each], default="")
    return name, found.get(name, 0)
