"""Detect this machine's cores, memory and GPUs, without torch."""

from __future__ import annotations

import os
import re
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_QUERY = "index,uuid,name,memory.total,compute_cap"


@dataclass(frozen=True)
class Gpu:
    """One GPU that this process may use."""

    name: str
    memory_bytes: int
    compute_capability: float


@dataclass(frozen=True)
class Hardware:
    """The hardware that the planner may use; memory is the free memory in bytes."""

    num_cores: int
    memory_bytes: int
    cpu_flags: frozenset[str] = frozenset()
    gpus: tuple[Gpu, ...] = ()
    gpu_note: str = ""
    """Why no GPU is seen, if there is none."""
    process_bytes: int = 0
    """The system's limit on the host memory of one process; 0 without a limit."""

    @classmethod
    def detect(cls) -> Hardware:
        """Return the part of this machine that this process may use."""
        gpus, note = find_gpus()
        return cls(count_cores(), available_memory(), cpu_flags(), gpus, note, process_limit())

    def rank_memory(self, device: str, ranks_per_node: int) -> int:
        """Return the device memory of one rank in bytes; 0 if unknown, for example for GPUs that are not
        here."""
        if device == "cuda":
            return min((gpu.memory_bytes for gpu in self.gpus), default=0)
        share = self.memory_bytes // ranks_per_node
        return min(share, self.process_bytes) if self.process_bytes else share


def _cpu_blocks(text: str) -> Iterator[dict[str, str]]:
    for block in text.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        yield {key.strip(): value.strip() for key, _, value in pairs}


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the processor's feature flags, such as amx_bf16; empty if the system does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(next((b.get("flags", b.get("Features", "")) for b in _cpu_blocks(text)), "").split())


def count_cores(cpuinfo: Path = Path("/proc/cpuinfo"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of physical cores that this process may use: those in its affinity, threads of one
    core counted once, within the cgroup's quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        blocks = list(_cpu_blocks(cpuinfo.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        blocks = []
    cores = {
        (b.get("physical id"), b["core id"])
        for b in blocks
        if "core id" in b and int(b.get("processor", -1)) in allowed
    }
    count = len(cores) or len(allowed)
    for folder in _cgroups(root):
        quota = _read(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return max(1, count)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cgroups(root: Path) -> Iterator[Path]:
    """Yield this process's control group and its ancestors in version 2's tree (a container sees its own as
    the root)."""
    own = next(
        (line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/"
    )
    folder = root / own.strip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def available_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the available memory in bytes: the machine's, within every control group's limit; the page cache
    counts as free."""
    import psutil

    free: int = psutil.virtual_memory().available
    for folder in _cgroups(root):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            cached = re.search(r"^inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    version_1 = root / "memory"
    limit, used = _read(version_1 / "memory.limit_in_bytes"), _read(version_1 / "memory.usage_in_bytes")
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used))
    return max(0, free)


def process_limit() -> int:
    """Return the limit in bytes on one process from `ulimit -d` and `ulimit -v`, which the ranks inherit; 0
    without a limit."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min((limit for limit in limits if limit != resource.RLIM_INFINITY), default=0)


def find_gpus(timeout: float = 20.0) -> tuple[tuple[Gpu, ...], str]:
    """Return nvidia-smi's GPUs within CUDA_VISIBLE_DEVICES, and if there are none, the reason."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        return (), "there is no nvidia-smi on this machine"
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {timeout:g} s"
    except OSError as error:
        return (), f"nvidia-smi cannot be started: {error.strerror}"
    if result.returncode:
        printed = (result.stdout + result.stderr).strip().splitlines()
        return (), f"nvidia-smi failed: {printed[0] if printed else f'exit code {result.returncode}'}"
    rows = [
        [part.strip() for part in line.split(",")]
        for line in result.stdout.splitlines()
        if line.count(",") >= 4
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        rows = _visible(rows, [part.strip() for part in visible.split(",") if part.strip()])
    gpus = tuple(_gpu(row) for row in rows)
    hidden = f"CUDA_VISIBLE_DEVICES={visible} leaves none" if visible is not None else "nvidia-smi lists none"
    return gpus, "" if gpus else hidden


def _visible(rows: list[list[str]], wanted: list[str]) -> list[list[str]]:
    """Apply CUDA's rule: indices or prefixes of UUIDs, in order, up to the first that does not exist."""
    kept = []
    for name in wanted:
        match = next(
            (row for row in rows if row[0] == name or (not name.isdigit() and row[1].startswith(name))), None
        )
        if match is None:
            break
        kept.append(match)
    return kept


def _gpu(row: list[str]) -> Gpu:
    _, _, name, memory, capability = row[:5]
    mebibytes = int(memory) if memory.isdigit() else 0
    number = float(capability) if re.fullmatch(r"\d+\.\d+", capability) else 0.0
    return Gpu(name, mebibytes << 20, number)
