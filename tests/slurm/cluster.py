"""A real Slurm cluster on this machine, for as long as a test needs it.

    with Cluster(directory) as cluster:
        job = cluster.submit("srun hostname", "--nodes=2")
        cluster.wait_state(job, "COMPLETED")

The controller runs on a machine `head`, the nodes are `n1`, `n2` and so on (see machines.py); the test's own
process is the login node. All of them share the host's files. Nothing in /etc is read or changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import Any, Self

from tests.slurm import accounting as database
from tests.slurm import machines
from tests.slurm.configuration import NSSWITCH, Settings, gres_conf, hosts, slurm_conf
from tests.slurm.machines import Daemon, Machine, Network, poll, tail

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
# The path of a socket has room for 107 characters; Slurm adds a node's name and the numbers of a job and its
# step.
_LONGEST_DIRECTORY = 75
_ASKS, _TIMES_TO_ASK = ("scontrol", "sinfo", "squeue", "scancel", "sacct"), 5
# What a job never leaves again.
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
_FIELD = re.compile(r"([A-Z][\w/:]*)=(.*?)(?=\s+[A-Z][\w/:]*=|\s*$)", re.DOTALL)
# What a shell sees that is itself in a job: a step (srun --pty bash) of a job by --mem-per-cpu, with GPUs and
# cores of another node.
INSIDE_A_JOB = {
    "SLURM_JOB_ID": "999999",
    "SLURM_JOBID": "999999",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "n[7-8]",
    "SLURM_NODELIST": "n[7-8]",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "7",
    "SLURM_NPROCS": "7",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "6",
    "SLURM_NODEID": "1",
    "SLURM_ARRAY_JOB_ID": "999990",
    "SLURM_ARRAY_TASK_ID": "9",
    "SLURM_RESTART_COUNT": "3",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_CPUS_PER_TASK": "7",
    "SRUN_CPUS_PER_TASK": "7",
    "SLURM_TRES_PER_TASK": "cpu=7",
    "SLURM_GPUS_PER_NODE": "3",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0xF000",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_CPU_BIND_LIST": "0xF000",
    "SLURM_CPU_BIND_VERBOSE": "quiet",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_UMASK": "0777",
    "PMI_RANK": "6",
    "PMI_SIZE": "7",
    "CUDA_VISIBLE_DEVICES": "5",
    "ROCR_VISIBLE_DEVICES": "5",
    "TMPDIR": "/tmp/slurm-job.999999",
}


def missing(accounting: bool = False) -> str | None:
    """Why no cluster can run here, or None if one can."""
    absent = next(
        (f"{program} is not installed" for program in _PROGRAMS if shutil.which(program) is None), None
    )
    return absent or (database.missing() if accounting else None) or machines.missing()


class Cluster:
    """Slurm with all its daemons. `options` are further fields of Settings."""

    def __init__(self, directory: Path, nodes: int = 3, **options: Any) -> None:
        if len(str(directory)) > _LONGEST_DIRECTORY:
            raise ValueError(
                f"{directory} is too long for the sockets in it: {_LONGEST_DIRECTORY} characters at most"
            )
        self.settings = Settings(directory, tuple(f"n{number}" for number in range(1, nodes + 1)), **options)
        self.directory = directory
        self.nodes = {name: Machine(name, directory) for name in self.settings.nodes}
        self._head = Machine("head", directory)
        self._network: Network | None = None
        self._services: list[Daemon] = []
        self._controller: Daemon | None = None
        self._slurmds: dict[str, Daemon] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in ("hosts", "nsswitch.conf"):
            (self.directory / name).touch()
        self._head.start()
        self._network = Network(self._head)
        self._configure()
        self._services.append(self._start_munge())
        if self.settings.accounting:
            self._services += database.start_database(self.settings, self._head)
            database.add_account(self.run)
        self.start_controller()
        for name in self.nodes:
            self.power_on(name)
        self.wait_nodes("idle", timeout=20)

    def stop(self) -> None:
        """Ends everything. Called twice, it does nothing."""
        # Nothing is kept, so no daemon is asked to end in order: the database alone would take a second.
        with contextlib.ExitStack() as stack:
            if self._network is not None:
                stack.callback(self._network.close)
            for machine in (self._head, *self.nodes.values()):
                stack.callback(machine.power_off)

    def _configure(self) -> None:
        assert self._network is not None
        addresses = {"head": self._network.address(1), "login": self._network.address(254)}
        addresses |= {name: self.address(name) for name in self.nodes}
        for name, text in (
            ("hosts", hosts(addresses)),
            ("nsswitch.conf", NSSWITCH),
            ("slurm.conf", slurm_conf(self.settings, addresses["head"], addresses)),
            ("gres.conf", gres_conf(self.settings)),
        ):
            (self.directory / name).write_text(text)
        (self.directory / "state").mkdir()
        for number in range(self.settings.gpus_per_node):
            # The numbers of /dev/null.
            os.mknod(self.directory / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))

    def _start_munge(self) -> Daemon:
        files = {name: self.directory / f"munge.{name}" for name in ("key", "pid", "seed", "log")}
        files["key"].write_bytes(os.urandom(128))
        files["key"].chmod(0o400)
        options = [f"--{'key' if name == 'key' else name}-file={path}" for name, path in files.items()]
        # pytest's directories are closed to other users, which munged would refuse: here root alone asks.
        daemon = self._head.daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.settings.munge_socket}",
            *options,
            log=self.directory / "munge.out",
        )
        poll(self.settings.munge_socket.exists, 10, "start of munged")
        return daemon

    def address(self, node: str) -> str:
        assert self._network is not None
        return self._network.address(10 + self.settings.nodes.index(node) + 1)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's own commands need on the login node: this process's own environment without another
        Slurm's variables."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        return {**inherited, "SLURM_CONF": str(self.settings.slurm_conf)}

    def run(self, *command: str, timeout: float = 600) -> str:
        """Runs it on the login node and returns what it printed, or raises with what it complained of.

        A controller that is too busy to answer is asked again what may be asked twice.
        """
        for _ in range(_TIMES_TO_ASK if command[0] in _ASKS else 1):
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=timeout
            )
            if "timed out" not in done.stderr:
                break
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def submit(self, script: str, *options: str) -> str:
        """A batch script without its first line; returns the job's id. It prints to `ID.out` in the cluster's
        directory."""
        output = f"--output={self.directory}/%j.out"
        path = self.directory / "script.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", output, "--open-mode=append", *options, str(path)).strip()

    def output(self, job: str) -> str:
        path = self.directory / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, by the names in `scontrol show job`."""
        return dict(_FIELD.findall(self.run("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait_state(self, job: str, *states: str, timeout: float = 60) -> str:
        """Waits until the job is in one of these states, and returns which."""
        seen: list[str] = []

        def arrived() -> bool:
            # A controller that starts does not answer yet.
            with contextlib.suppress(RuntimeError):
                seen.append(self.state(job))
            return bool(seen) and seen[-1] in (*states, *_ENDS)

        with contextlib.suppress(TimeoutError):
            poll(arrived, timeout, "")
        if seen and seen[-1] in states:
            return seen[-1]
        expected = f"job {job} is not {' or '.join(states)} after {timeout:g} s or at its end"
        raise TimeoutError(
            f"{expected}, but {seen[-1:]}\n{self.output(job)}\n{tail(self.directory / 'slurmctld.log')}"
        )

    def node_states(self) -> dict[str, str]:
        """Such as `idle`, `allocated`, `down*`, `drained`, by node."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def wait_nodes(self, state: str, *nodes: str, timeout: float = 60) -> None:
        def arrived() -> bool:
            with contextlib.suppress(RuntimeError):
                states = self.node_states()
                return all(states.get(name) == state for name in nodes or self.nodes)
            return False

        try:
            poll(arrived, timeout, f"{' '.join(nodes or self.nodes)} {state}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{tail(self.directory / 'slurmctld.log')}") from None

    def start_controller(self) -> None:
        self._controller = self._head.daemon(
            "slurmctld", "-D", "-f", str(self.settings.slurm_conf), log=self.directory / "slurmctld.out"
        )

    def stop_controller(self) -> None:
        if self._controller is not None:
            self._controller.stop()

    def restart_controller(self) -> None:
        self.stop_controller()
        self.start_controller()

    def start_slurmd(self, node: str) -> None:
        command = ["slurmd", "-D", "-N", node, "-f", str(self.settings.slurm_conf)]
        self._slurmds[node] = self.nodes[node].daemon(*command, log=self.directory / f"{node}.out")

    def kill_slurmd(self, node: str) -> None:
        """The daemon dies; the jobs' processes on the node go on."""
        self._slurmds[node].stop(signal.SIGKILL)

    def power_off(self, node: str) -> None:
        """Everything on the node ends at once; the controller finds out by itself."""
        machine = self.nodes[node]
        if machine.is_on:
            machine.power_off()
            if self._network is not None:
                self._network.unplug(node)

    def power_on(self, node: str) -> None:
        assert self._network is not None
        self.nodes[node].start()
        self._network.plug(self.nodes[node], 10 + self.settings.nodes.index(node) + 1)
        self.start_slurmd(node)

    def cut(self, node: str) -> None:
        """Nothing passes to or from the node any more; its processes go on."""
        assert self._network is not None
        self._network.switch(node, on=False)

    def reconnect(self, node: str) -> None:
        assert self._network is not None
        self._network.switch(node, on=True)

    def drain(self, node: str) -> None:
        """No new job on the node; what runs there goes on."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def resume(self, node: str) -> None:
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
