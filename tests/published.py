"""What others have published of runs that launcher could plan: FSDP alone, dense decoders, bf16 with fp32
states. Each with its source.

Of other codes, whose attention, loss and recomputation are not ours: a run that took place has to fit, one
that ran out of memory must not, and the speed has to lie near.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.job.schema import ActivationCheckpointing, Offload
from launcher.planner.forecast import Forecast, forecast_of
from launcher.planner.hardware.gpu_table import gpu_type
from launcher.planner.plan import Plan
from launcher.planner.target import Target
from tests.training.plans import deepspeed, plan_of

TITAN_A100 = "torchtitan docs/performance.md, 2024: FSDP2 on 64 A100 80 GB"
TITAN_H100 = "torchtitan docs/performance.md at eaea6f6: H100 96 GB, 500 W, 2.4 TB/s"
TITAN_LARGE = "torchtitan docs/performance.md, 2024: 405B on 128 H100 94 GB, FSDP2 alone: out of memory"
FMS = "foundation-model-stack/fms-fsdp README.md at 0d31998: 128 A100 80 GB"
TORCHTUNE = (
    "torchtune README.md at 0031bfb, 2024, with recipes/configs/llama3_1/8B_lora_single_device.yaml and "
    "70B_lora.yaml there"
)
LAMBDA = (
    "LambdaLabsML/distributed-training-guide 05-training-llama-405b/README.md at 1fbe39a: offloaded to the "
    "hosts; GB of 1e9 bytes"
)
MOSAIC = "mosaicml/llm-foundry scripts/train/benchmarking/README.md at 061f2c7"


@dataclass(frozen=True)
class Published:
    """One run that somebody has described."""

    model: str
    gpu: str
    num_gpus: int
    length: int
    micro_batch: int
    way: ActivationCheckpointing
    source: str
    tokens_per_second: float = 0.0
    """Of one GPU; 0 where it ran out of memory."""
    accumulation: int = 1
    replicate: int = 1
    memory_gib: float = 0.0
    """Its own highest, where it is given."""

    adapter: tuple[int, tuple[str, ...]] | None = None
    """Rank, and the layers that have one."""

    offload: Offload = "none"

    @property
    def ran(self) -> bool:
        return self.tokens_per_second > 0

    @property
    def memory_compares(self) -> bool:
        """GPT-2, as which MPT is planned, keeps more between its operators than MPT does where nothing is
        recomputed."""
        return not self.model.startswith("MPT") or self.way != "none"

    @property
    def speed_compares(self) -> bool:
        """torchtune compiles its layers, and by its figures an RTX 4090 would run LoRA at nine tenths of its
        peak rate. The hosts of what was offloaded are not described."""
        return self.adapter is None and self.offload == "none"

    @property
    def name(self) -> str:
        cut = f" ({self.replicate} copies)" if self.replicate > 1 else ""
        beside = (
            "" if self.adapter is None else f", rank {self.adapter[0]} beside {' '.join(self.adapter[1])}"
        )
        moved = "" if self.offload == "none" else f", {self.offload} offloaded"
        return (
            f"{self.model}, {self.num_gpus} {self.gpu}{cut}, {self.micro_batch} x {self.length}, "
            f"{self.way}{beside}{moved}"
        )


def _llama(
    hidden: int, layers: int, heads: int, key_value_heads: int, inner: int, words: int
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "intermediate_size": inner, "vocab_size": words,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    }  # fmt: skip


def _mpt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """As the formulas' GPT-2: four times as wide inside, tied embeddings. MPT has no biases and no table of
    positions."""
    return {
        "model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 50368,
        "n_positions": 2048,
        "activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


MODELS = {
    "Llama 3 8B": _llama(4096, 32, 32, 8, 14336, 128256),
    "Llama 3 70B": _llama(8192, 80, 64, 8, 28672, 128256),
    "Llama 3.1 405B": _llama(16384, 126, 128, 8, 53248, 128256),
    "Llama 2 7B": _llama(4096, 32, 32, 32, 11008, 32000),
    "Llama 2 13B": _llama(5120, 40, 40, 40, 13824, 32000),
    "Llama 34B": _llama(8192, 48, 64, 8, 22016, 32000),
    "Llama 2 70B": _llama(8192, 80, 64, 8, 28672, 32000),
    "MPT 1B": _mpt(2048, 24, 16),
    "MPT 3B": _mpt(2560, 32, 20),
    "MPT 7B": _mpt(4096, 32, 32),
    "MPT 13B": _mpt(5120, 40, 40),
    "MPT 30B": _mpt(7168, 48, 56),
    "MPT 70B": _mpt(8192, 80, 64),
}
ZERO = (
    "Rajbhandari et al. 2020, arXiv 1910.02054, table 1: model states of 7.5 billion parameters, GB of 1e9 "
    "bytes"
)
ZERO_STATES = {
    1: {4: 52.5, 16: 35.6, 64: 31.4},
    2: {4: 41.3, 16: 21.6, 64: 16.6},
    3: {4: 30.0, 16: 7.5, 64: 1.88},
}
"""By stage and number of GPUs. There gradients are fp16, 2 bytes each; launcher adds them up in fp32."""
A, H = "a100-80gb", "h100-80gb"
CASES = (
    Published("Llama 3 8B", A, 64, 8192, 1, "selective", TITAN_A100, 2973),
    Published("Llama 3 70B", A, 64, 8192, 1, "full", TITAN_A100, 331),
    Published("Llama 3 8B", H, 8, 8192, 2, "selective", TITAN_H100, 5762, memory_gib=82.4),
    Published("Llama 3 8B", H, 128, 8192, 2, "selective", TITAN_H100, 5605, memory_gib=67.0),
    Published("Llama 3.1 405B", H, 128, 8192, 2, "full", TITAN_LARGE),
    Published(
        "Llama 3.1 405B",
        H,
        64,
        4096,
        1,
        "full",
        LAMBDA,
        4096 / 30,
        memory_gib=52.9e9 / 2**30,
        offload="parameters",
    ),
    Published("Llama 2 7B", A, 128, 4096, 2, "none", FMS, 3760, replicate=16),
    Published("Llama 2 13B", A, 128, 4096, 1, "none", FMS, 1700, replicate=16),
    Published("Llama 34B", A, 128, 4096, 8, "full", FMS, 772),
    Published("Llama 2 70B", A, 128, 4096, 6, "full", FMS, 380),
    Published("MPT 70B", H, 64, 2048, 8, "full", MOSAIC, 1039, accumulation=4),
    Published("MPT 70B", H, 32, 2048, 2, "full", MOSAIC, 882, accumulation=16),
    Published("MPT 30B", H, 8, 8192, 1, "full", MOSAIC, 1384, accumulation=21),
    Published("MPT 30B", H, 8, 2048, 3, "full", MOSAIC, 2002, accumulation=21),
    Published("MPT 30B", H, 32, 2048, 14, "full", MOSAIC, 2308, accumulation=3),
    Published("MPT 13B", H, 64, 2048, 2, "none", MOSAIC, 4800),
    Published("MPT 13B", H, 8, 2048, 2, "none", MOSAIC, 4792),
    Published("MPT 13B", H, 8, 4096, 10, "full", MOSAIC, 4717, accumulation=3),
    Published("MPT 7B", H, 8, 2048, 6, "none", MOSAIC, 10643),
    Published("MPT 7B", H, 8, 8192, 8, "full", MOSAIC, 6935, accumulation=2),
    Published("MPT 3B", H, 64, 2048, 6, "none", MOSAIC, 22525, accumulation=3),
    Published("MPT 1B", H, 8, 4096, 7, "none", MOSAIC, 38535, accumulation=4),
    Published("MPT 30B", A, 8, 8192, 1, "full", MOSAIC, 574, accumulation=21),
    Published("MPT 30B", A, 8, 4096, 1, "full", MOSAIC, 814, accumulation=21),
    Published("MPT 30B", A, 8, 2048, 3, "full", MOSAIC, 916, accumulation=21),
    Published("MPT 13B", A, 8, 4096, 10, "full", MOSAIC, 2060, accumulation=3),
    Published("MPT 13B", A, 8, 2048, 2, "none", MOSAIC, 2262, accumulation=3),
    Published("MPT 7B", A, 8, 8192, 8, "full", MOSAIC, 3206, accumulation=2),
    Published("MPT 7B", A, 8, 2048, 6, "none", MOSAIC, 4641, accumulation=2),
    Published("MPT 3B", A, 8, 4096, 5, "none", MOSAIC, 9457, accumulation=6),
    Published("MPT 1B", A, 8, 4096, 7, "none", MOSAIC, 17807, accumulation=4),
    Published(
        "Llama 3 8B",
        "rtx4090",
        1,
        2048,
        2,
        "full",
        TORCHTUNE,
        3083,
        memory_gib=16.2,
        adapter=(8, ("q_proj", "v_proj")),
    ),
    Published(
        "Llama 3 70B",
        A,
        8,
        2048,
        2,
        "full",
        TORCHTUNE,
        3497 / 8,
        memory_gib=27.6,
        adapter=(16, ("q_proj", "k_proj", "v_proj")),
    ),
)


def plan_of_case(case: Published, directory: Path) -> Plan:
    """The plan as launcher would run it; the model's config is written to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = MODELS[case.model] | ({"n_positions": case.length} if case.model.startswith("MPT") else {})
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    batch = {
        "micro_batch_size": case.micro_batch,
        "accumulation_steps": case.accumulation,
        "data_parallel_size": case.num_gpus,
    }
    mesh = {
        "device": "cuda",
        "nodes": max(1, case.num_gpus // 8),
        "ranks_per_node": 8,
        "dp_replicate": case.replicate,
    }
    changes: dict[str, Any] = {f"mesh__{key}": value for key, value in mesh.items()}
    changes |= {f"batch__{key}": value for key, value in batch.items()}
    changes |= {
        "mesh__dp_shard": case.num_gpus // case.replicate,
        "batch__global_batch_size": case.micro_batch * case.accumulation * case.num_gpus,
    }
    if case.adapter is not None:
        changes["model__adapter"] = {"rank": case.adapter[0], "targets": case.adapter[1]}
    return plan_of(
        directory, case.num_gpus,
        precision="bf16", activation_checkpointing=case.way, offload=case.offload,
        data__max_length=case.length, **changes,
    )  # fmt: skip


def forecast_of_case(case: Published, directory: Path) -> Forecast:
    """What the planner says of it."""
    gpu = gpu_type(case.gpu)
    said = forecast_of(plan_of_case(case, directory), Target(gpu.memory_bytes, gpu))
    assert said is not None
    return said


def model_states(stage: int, num_gpus: int, directory: Path) -> float:
    """GB of parameters, gradients and optimizer state that the planner says ZeRO keeps of 7.5 billion
    parameters, in the steady step."""
    sizes = {"n_embd": 4096, "n_layer": 36, "n_head": 32, "vocab_size": 60000, "n_positions": 1024}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes), encoding="utf-8")
    engine = deepspeed(stage)
    engine["zero"] |= {
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
        "max_live_parameters": 1_000_000_000,
    }
    plan = plan_of(
        directory, num_gpus, mesh__device="cuda", precision="bf16", activation_checkpointing="full",
        batch__global_batch_size=num_gpus,
        batch__micro_batch_size=1, data__max_length=1024, **engine,
    )  # fmt: skip
    said = forecast_of(plan, Target())
    assert said is not None
    steady = next(phase for phase in said.footprint.phases if phase.name == "steady step")
    return sum(steady.parts[kind] for kind in ("parameters", "gradients", "optimizer state")) / 1e9


def fp32_gradients(stage: int, num_gpus: int) -> float:
    """GB that gradients in fp32 take of 7.5 billion parameters beyond fp16 ones.

    Stage 1 keeps all of them, and at its end a rank's part once more.
    """
    return 7.5 * {1: 2 + 4 / num_gpus, 2: 2 / num_gpus, 3: 2 / num_gpus}[stage]
