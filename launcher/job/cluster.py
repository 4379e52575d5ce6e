"""The section `cluster`: where a job runs, and what it asks of Slurm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.values import HangAfter, Line, NodeCount, Seconds, Section, Variable, Word

Auto = Literal["auto"]
NetworkName = Literal["ib400", "ib200", "ib100", "ethernet100", "ethernet25"]


class Container(Section):
    """The container that the ranks run in."""

    image: Line
    """An image file, or the address of one."""
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    """What starts it: Apptainer, or Slurm's own plugin Pyxis over Enroot."""
    mounts: tuple[Line, ...] = ()
    """Directories it sees besides the run's own, as /data or /data:/inside."""
    python: Line = "python3"
    """The interpreter inside, which has launcher installed."""
    options: tuple[Line, ...] = ()
    """Further options of the runtime, one a line."""


class Cluster(Section):
    """Say where the job runs."""

    profile: Line | None = None
    """A site's profile: its name below the profile directory, or a file. Keys of the job file override it."""
    nodes: NodeCount = 1
    """The number of machines. Under Slurm also a range (2-8): the job starts on as many as are free."""
    gpus_per_node: Annotated[int, Field(ge=0, le=1024)] | Auto = "auto"
    """GPUs of each node; 0 trains on the CPU."""
    gpu: Word | None = None
    """The kind of GPU, by its name in the planner's table, as h100-80gb: the plan counts on it if they are
    not on this machine."""
    network: NetworkName | None = None
    """The network between the nodes, for one GPU: the planner counts on it. Left out, what such nodes
    commonly have."""
    ranks_per_node: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"
    """Ranks (processes) on each node; with GPUs, one for each GPU."""
    threads_per_rank: Annotated[int, Field(ge=1, le=65_536)] | Auto = "auto"
    """CPU threads of each rank."""
    time_limit: Seconds | None = None
    """Slurm: seconds (or 8h, 2d) that the job may take at a time; a longer run goes on in the next one."""
    partition: Line | None = None
    """Slurm: the partition, or several with commas."""
    account: Line | None = None
    """Slurm: who pays."""
    qos: Line | None = None
    """Slurm: the quality of service."""
    reservation: Line | None = None
    """Slurm: the reservation."""
    constraint: Line | None = None
    """Slurm: features that the nodes must have."""
    exclude: Line | None = None
    """Slurm: nodes to leave out."""
    nodelist: Line | None = None
    """Slurm: nodes to take."""
    mem: Line | None = None
    """Slurm: memory of each node, as 200G; 0 takes all of it."""
    cpus_per_node: Annotated[int, Field(ge=1)] | None = None
    """Slurm: cores of each node to ask for, where that is not ranks times threads."""
    gpu_option: Literal["gres", "gpus-per-node"] = "gres"
    """Slurm: the option by which this site's GPUs are requested."""
    gpu_type: Word | None = None
    """Slurm: the site's name of the GPUs, as in gpu:TYPE:8."""
    exclusive: bool = False
    """Slurm: whole nodes."""
    dependency: Line | None = None
    """Slurm: what must be over before, as afterok:1234."""
    begin: Line | None = None
    """Slurm: when it may start at the earliest, as now+1hour."""
    comment: Line | None = None
    """Slurm: a remark."""
    mail_user: Line | None = None
    """Slurm: who gets mail."""
    mail_type: Line | None = None
    """Slurm: when, as END,FAIL."""
    sbatch: dict[Word, Line | int | bool] = Field(default={})
    """Slurm: any other option of sbatch by its long name; true for one without a value."""
    modules: tuple[Line, ...] = ()
    """Slurm: modules to load before the ranks start."""
    setup: tuple[Line, ...] = ()
    """Slurm: shell lines to run before the ranks start; the first that fails ends the job."""
    environment: dict[Variable, Line] = Field(default={})
    """Slurm: variables of the environment."""
    container: Container | None = None
    interface: Word | None = None
    """The network interface between nodes; without it the one that leads to the other nodes."""
    requeue: bool = True
    """Slurm: go on by itself after preemption, the time limit, a lost node or rank."""
    attempts_without_progress: int = Field(default=3, ge=1)
    """Slurm: stop after this many attempts in a row that saved nothing new. Preempted ones, and those whose
    node was lost, do not count."""
    grace: Seconds = 30.0
    """The time the ranks have to save and leave when they are told to stop, in seconds (or 30s, 2min)."""
    share_with_group: bool = False
    """Let your group read what the run writes (logs, checkpoints, code, exports), whatever the umask says;
    else the umask alone counts."""
    hang_after: HangAfter = "auto"
    """Seconds (or 90s, 5min) without life until a hang is named; as long again, and it is ended. `auto`: by
    phase; `off`: never."""


def node_range(nodes: int | str) -> tuple[int, int]:
    """Return the fewest and the most nodes that `cluster.nodes` allows."""
    low, _, high = str(nodes).partition("-")
    return int(low), int(high or low)
