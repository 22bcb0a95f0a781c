"""Settings of what runs the runs of a sweep. Source of every default: [D] ours."""

from typing import Literal

from pydantic import Field

from dinoscale.config.fields import Count, CountOrZero, Positive, Section


class SlurmConfig(Section):
    """What each run asks of Slurm; what is null is left to the cluster."""

    partition: str | None = Field(default=None, min_length=1, description="Where jobs go.")
    account: str | None = Field(default=None, min_length=1, description="Who pays.")
    hours: Positive = Field(default=24.0, description="Longest time of a run in one go, in hours.")
    cpus_per_process: Count = Field(default=9, description="Cores of a rank: its loader and one.")
    setup: tuple[str, ...] = Field(
        default=(), strict=False, description="Lines of shell before a run, as 'module load cuda'."
    )
    options: dict[str, str | int] = Field(
        default_factory=dict, description="More options of sbatch by name, as constraint: h100."
    )


class ExecutorConfig(Section):
    """Where the runs of a sweep happen, and how many at a time."""

    kind: Literal["local", "slurm", "submitit_local"] = Field(
        default="local",
        description="local: processes of this machine. slurm: a job for each run, by submitit. "
        "submitit_local: as slurm, by submitit's stand-in on this machine, to try a sweep.",
    )
    parallel: Count = Field(default=1, description="Runs at a time; on slurm jobs in the queue.")
    nodes: Count = Field(default=1, description="Nodes of a run; more than one on slurm only.")
    processes: Count = Field(
        default=1, description="Ranks of a run on each node, usually its GPUs."
    )
    retries: CountOrZero = Field(
        default=1, description="How often a run that failed is started again, from its checkpoint."
    )
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
