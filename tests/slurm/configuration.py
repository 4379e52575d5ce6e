"""What Slurm's files say for a test cluster: pure functions of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    directory: Path
    """Holds every file, socket and log of the cluster."""
    nodes: tuple[str, ...]
    cpus_per_node: int = 2
    memory_per_node: int = 8000
    """MB. Nothing is allocated or enforced: it is what jobs ask from."""
    gpus_per_node: int = 0
    """Not real: devices that read as empty, so that Slurm hands them out."""
    accounting: bool = False
    kill_wait: int = 7
    """Seconds from SIGTERM to SIGKILL when a job is cancelled, preempted or out of time."""
    grace_time: int = 5
    """Seconds that a job in `low` is left after it was told of its preemption."""
    slurmd_timeout: int = 10
    """Seconds without an answer after which a node counts as down."""

    @property
    def slurm_conf(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.directory / "munge.socket"


def slurm_conf(settings: Settings, controller: str, addresses: dict[str, str]) -> str:
    return "\n".join(
        [
            _daemons(settings, controller),
            _behaviour(settings, controller),
            *_nodes(settings, addresses),
            *_partitions(settings),
            "",
        ]
    )


def _daemons(settings: Settings, controller: str) -> str:
    directory = settings.directory
    # cred_expire: a job that was requeued waits until its old credential has expired, 120 s by default.
    return f"""ClusterName=test
SlurmctldHost=head({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={settings.munge_socket},cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout={settings.slurmd_timeout}
TCPTimeout=2
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none"""


def _behaviour(settings: Settings, controller: str) -> str:
    # Schedulers look every few seconds, not every half minute: tests wait for them.
    lines = [
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "EnforcePartLimits=ALL",
        "OverTimeLimit=0",
        "JobRequeue=1",
        f"KillWait={settings.kill_wait}",
        f"DefMemPerCPU={settings.memory_per_node // settings.cpus_per_node}",
    ]
    if settings.accounting:
        # Slurm's word for the socket by which slurmdbd is asked is a password.
        lines += ["AccountingStorageType=accounting_storage/slurmdbd", f"AccountingStorageHost={controller}"]
        lines += ["AccountingStorageEnforce=associations", f"AccountingStoragePass={settings.munge_socket}"]
        lines += ["JobAcctGatherType=jobacct_gather/linux", "JobAcctGatherFrequency=5"]
    else:
        lines += ["AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none"]
    if settings.gpus_per_node:
        lines += ["GresTypes=gpu"]
    return "\n".join(lines)


def _nodes(settings: Settings, addresses: dict[str, str]) -> list[str]:
    gres = f" Gres=gpu:{settings.gpus_per_node}" if settings.gpus_per_node else ""
    of_each = f"CPUs={settings.cpus_per_node} RealMemory={settings.memory_per_node}{gres} State=UNKNOWN"
    return [f"NodeName={name} NodeAddr={addresses[name]} {of_each}" for name in settings.nodes]


def _partitions(settings: Settings) -> list[str]:
    nodes = f"Nodes={','.join(settings.nodes)}"
    return [
        f"PartitionName=main {nodes} Default=YES PriorityTier=1 PreemptMode=OFF",
        f"PartitionName=low {nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace_time}",
        f"PartitionName=high {nodes} PriorityTier=10 PreemptMode=OFF",
        f"PartitionName=short {nodes} PriorityTier=1 PreemptMode=OFF MaxTime=2 MaxNodes=2",
    ]


def gres_conf(settings: Settings) -> str:
    if not settings.gpus_per_node:
        return ""
    return (
        f"AutoDetect=off\nNodeName={','.join(settings.nodes)} Name=gpu "
        f"File={settings.directory}/gpu[0-{settings.gpus_per_node - 1}]\n"
    )


def hosts(addresses: dict[str, str]) -> str:
    return "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **addresses}.items())


# From files only: a look-up at a name server that cannot be reached takes 10 s.
NSSWITCH = "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"


def slurmdbd_conf(settings: Settings) -> str:
    directory = settings.directory
    return f"""DbdHost=head
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={settings.munge_socket}
LogFile={directory}/slurmdbd.log
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""
