"""The table of GPUs and links, with sources: dense rates, without sparsity."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from launcher.errors import ConfigurationError, Problem
from launcher.job.cluster import NetworkName
from launcher.planner.hardware.detect import Gpu, Hardware

PCIE_4, PCIE_5 = 32e9, 64e9
"""Bytes per second, one way, of a slot with 16 lanes, as vendors round them."""
MEMORY_SHARE = 0.8
"""Share of the memory rate that memory-bound operators reach. Assumed; with it and the shares of the matrix
rates, forecasts agree with published runs (docs/benchmarks/published.md)."""
LINK_SHARE = 0.75
"""Share of a link's rate that large collectives reach. Assumed."""
HOST_BANDWIDTH = 200e9
"""Bytes per second of a node's host memory. Assumed: eight channels of DDR4-3200 have 205e9."""


@dataclass(frozen=True)
class GpuType:
    """One kind of GPU. Rates are in operations and bytes per second."""

    key: str
    name: str
    memory_bytes: int
    """Memory available to programs, as the driver reports it if known; vendors' sizes are not all in GiB."""
    half_rate: float
    """Rate of dense matrix products in bf16 or fp16, accumulated in fp32."""
    full_rate: float
    """Rate of fp32 outside of the matrix units."""
    bandwidth: float
    """Memory bandwidth."""
    link: float
    """Rate to its neighbours in a node, one way."""
    network: float
    """Rate to other nodes per GPU, one way, on the usual network of nodes with this GPU."""
    capability: float
    source: str
    matrix_share: float = 0.6
    """Share of the matrix rate that large products reach in training. Those of the H100 and the A100 are
    fitted to published runs (see docs/benchmarks/published.md); the others are assumed."""
    memory_share: float = MEMORY_SHARE
    link_share: float = LINK_SHARE
    operator_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds to call one operator, by activation checkpointing, if measured."""
    message_seconds: float | None = None
    """Latency of one message in seconds, if measured."""
    host_link: float = PCIE_4
    """Rate to host memory, one way."""
    host_bandwidth: float = HOST_BANDWIDTH
    """Bandwidth of host memory, which all GPUs of a node share."""


_NV = "https://www.nvidia.com/en-us/data-center"
NETWORKS: dict[NetworkName, float] = {
    "ib400": 50e9,
    "ib200": 25e9,
    "ib100": 12.5e9,
    "ethernet100": 12.5e9,
    "ethernet25": 3.1e9,
}
"""Bytes per second and GPU, one way: the line rate divided by eight (InfiniBand NDR 400, HDR 200, EDR 100
Gb/s)."""
# fmt: off
TABLE = (
    GpuType("a100-40gb", "NVIDIA A100 40GB", 40 << 30, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, 8.0,
            f"{_NV}/a100 (datasheet, SXM)", 0.7),
    GpuType("a100-80gb", "NVIDIA A100 80GB", 80 << 30, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 8.0,
            f"{_NV}/a100 (datasheet, SXM)", 0.7),
    GpuType("h100-80gb", "NVIDIA H100 SXM", 80 << 30, 989e12, 67e12, 3.35e12, 450e9, 50e9, 9.0,
            f"{_NV}/h100 (datasheet, SXM)", host_link=PCIE_5),
    GpuType("h100-pcie", "NVIDIA H100 PCIe", 80 << 30, 756e12, 51e12, 2.0e12, 64e9, 25e9, 9.0,
            f"{_NV}/h100 (datasheet, PCIe; product brief PB-11133)", host_link=PCIE_5),
    GpuType("h100-nvl", "NVIDIA H100 NVL", 95_830 << 20, 835e12, 60e12, 3.9e12, 300e9, 25e9, 9.0,
            f"{_NV}/h100 (datasheet, NVL)", host_link=PCIE_5),
    GpuType("h200", "NVIDIA H200", 143_771 << 20, 989e12, 67e12, 4.8e12, 450e9, 50e9, 9.0,
            f"{_NV}/h200 (datasheet, SXM)", host_link=PCIE_5),
    GpuType("b200", "NVIDIA B200", 182_630 << 20, 2250e12, 75e12, 8.0e12, 900e9, 50e9, 10.0,
            f"{_NV}/dgx-b200 (datasheet, an eighth of it)", host_link=PCIE_5),
    GpuType("gb200", "NVIDIA GB200", int(186 * 0.99e9), 2500e12, 80e12, 8.0e12, 900e9, 50e9, 10.0,
            f"{_NV}/gb200-nvl72 (a 72nd of it)", host_link=225e9),
    GpuType("l40s", "NVIDIA L40S", 48 << 30, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9, 8.9,
            f"{_NV}/l40s (datasheet; PCIe 4.0 x16)"),
    GpuType("l4", "NVIDIA L4", 24 << 30, 121e12, 30.3e12, 0.3e12, 32e9, 12.5e9, 8.9,
            f"{_NV}/l4 (datasheet; PCIe 4.0 x16)"),
    GpuType("a10", "NVIDIA A10", 24 << 30, 125e12, 31.2e12, 0.6e12, 32e9, 12.5e9, 8.6,
            f"{_NV}/a10-gpu (datasheet; PCIe 4.0 x16)"),
    GpuType("a30", "NVIDIA A30", 24 << 30, 165e12, 10.3e12, 0.933e12, 32e9, 12.5e9, 8.0,
            f"{_NV}/a30-gpu (datasheet; PCIe 4.0 x16)"),
    GpuType("a40", "NVIDIA A40", 48 << 30, 149.7e12, 37.4e12, 0.696e12, 32e9, 12.5e9, 8.6,
            f"{_NV}/a40 (datasheet; PCIe 4.0 x16)"),
    GpuType("v100-32gb", "NVIDIA V100", 32 << 30, 125e12, 15.7e12, 0.9e12, 150e9, 12.5e9, 7.0,
            f"{_NV}/v100 (datasheet, SXM2; fp16 alone)"),
    GpuType("rtx3090", "NVIDIA GeForce RTX 3090", 24 << 30, 71e12, 35.6e12, 0.936e12, 32e9, 12.5e9, 8.6,
            "NVIDIA Ampere GA102 architecture whitepaper, appendix A (PCIe 4.0 x16)"),
    GpuType("rtx4090", "NVIDIA GeForce RTX 4090", 24 << 30, 165e12, 82.6e12, 1.008e12, 32e9, 12.5e9, 8.9,
            "NVIDIA Ada GPU architecture whitepaper, table 2 (PCIe 4.0 x16)"),
    GpuType("mi300x", "AMD Instinct MI300X", 192 << 30, 1307e12, 163.4e12, 5.3e12, 448e9, 50e9, 9.4,
            "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html "
            "(7 links of 64 GB/s each way)", host_link=PCIE_5),
)
# fmt: on
BY_KEY = {gpu.key: gpu for gpu in TABLE}


def on_network(gpu: GpuType, name: NetworkName | None) -> GpuType:
    """Return the GPU in nodes connected by the network `name`; by their usual network if it is None."""
    return gpu if name is None else replace(gpu, network=NETWORKS[name])


def gpu_type(key: str, where: str = "--gpu") -> GpuType:
    """Return the GPU with a name, which was given at `where`. Raises ConfigurationError with the nearest
    names."""
    match = BY_KEY.get(key.strip().lower())
    if match is None:
        given = key.strip().lower()
        alike = [name for name in BY_KEY if given and given in name]
        near = alike or difflib.get_close_matches(given, BY_KEY, 3, 0.3) or list(BY_KEY)
        raise ConfigurationError(Problem(where, key, f"is not in the table; the nearest: {', '.join(near)}"))
    return match


def seen(hardware: Hardware) -> GpuType | None:
    """Return the table's entry for this machine's GPUs, by their name; None if there is none."""
    if not hardware.gpus:
        return None
    name, memory = hardware.gpus[0].name.lower(), hardware.gpus[0].memory_bytes
    alike = [gpu for gpu in TABLE if _is_named(gpu, name)]
    pcie = "pcie" in name
    return min(
        alike,
        key=lambda gpu: (abs(gpu.memory_bytes - memory) >> 33, ("pcie" in gpu.key) != pcie),
        default=None,
    )


def name_here(device: str) -> str:
    """Return the name of this machine's devices: `cpu`, a name of the table, or `gpu`."""
    if device == "cpu":
        return device
    known = seen(Hardware.detect())
    return known.key if known else "gpu"


def _is_named(gpu: GpuType, name: str) -> bool:
    """Return whether a vendor's name contains the GPU's as a word: a GB200 is no B200, and an L40 no L4."""
    word = re.sub(r"(?<=[a-z])(?=\d)", r"\\s*", gpu.key.split("-")[0])
    return re.search(rf"(?<![a-z0-9]){word}(?![a-z0-9])", name) is not None


def as_hardware(gpu: GpuType, per_node: int, cores: int = 64, memory_bytes: int | None = None) -> Hardware:
    """Return a node with these GPUs that is not here. Without arguments, cores and host memory (1 TiB) are
    guesses."""
    one = Gpu(gpu.name, gpu.memory_bytes, gpu.capability)
    return Hardware(cores, memory_bytes or 1 << 40, frozenset(), (one,) * per_node)
