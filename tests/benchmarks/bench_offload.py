"""What offloading saves of a rank's memory, and what it costs: ZeRO-3, with the optimizer on files, and with
the parameters there too.

PYTHONPATH=. python tests/benchmarks/bench_offload.py --write
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _report import conditions, sentence, table, write
from transformers import AutoConfig

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.training.engines import build
from launcher.training.engines.operators import build_operators
from launcher.training.model import attention
from tests.training.batches import batch_of_samples as packed_batch
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.test_engine import Causal
from tests.training.tiny import model_of

NUM_STEPS = 4
PREFACE = """# Offloading

`MALLOC_MMAP_THRESHOLD_=1048576 tests/benchmarks/bench_offload.py` (glibc as runs have it): a llama with random weights, ZeRO-3 on 2 ranks
of the CPU, fp32, AdamW. Anonymous memory of rank 0, sampled every 5 ms: after loading with the optimizer's state made, and the peak of the
steps. "On the host" are the bytes of those tensors that DeepSpeed puts into the host's memory when it offloads (masters, moments, and the
partitions of gradients, by their sizes); "of a device" is the rest of the peak, less the bare process: what a device would have to hold.
On a CPU both are the same memory, so that `offload_to: cpu` makes no rank smaller here; a GPU was not at hand.
"""


class Peak(threading.Thread):
    """The largest anonymous memory of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def anonymous_bytes() -> int:
    """Of this process, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def host_bytes(plan: Plan, zero: Any) -> int:
    """Of the tensors that stage 3 makes with `device: cpu` when the optimizer is offloaded there (DeepSpeed
    0.19.8, zero/stage3.py)."""
    if plan.offload == "none" or plan.offload_to != "cpu":
        return 0
    masters = list(zero.fp32_partitioned_groups_flat)
    moments = [
        value
        for master in masters
        for value in zero.optimizer.state[master].values()
        if isinstance(value, torch.Tensor)
    ]
    gradients = [
        zero.grad_partitions_flat_buffer,
        *(master.grad for master in masters if master.grad is not None),
    ]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*masters, *moments, *gradients)
    }
    return sum(storages.values())


def measure(plan: Plan) -> dict[str, Any]:
    """On each rank: a few steps of 2 samples of 64 tokens; losses, seconds and memory."""
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    bare = anonymous_bytes()
    build_operators(plan, lambda done, total: None)
    engine = build(plan, Causal, config, deepspeed_config(plan))  # type: ignore[arg-type]
    loaded, losses, seconds = anonymous_bytes(), [], []
    peak = Peak()
    peak.start()
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step * 2 + torch.distributed.get_rank())
        begin = time.perf_counter()
        batch = packed_batch([torch.randint(3, 1000, (64,), generator=generator) for _ in range(2)])
        loss = engine.micro_step(batch, 1 / 252, True).loss_sum.detach().double()
        torch.distributed.all_reduce(loss)
        engine.squared_gradient_norm()
        engine.optimizer_step(1e-4, 1.0)
        losses.append(float(loss) / 252)
        seconds.append(time.perf_counter() - begin)
    highest, host = peak.stop(), host_bytes(plan, engine._zero)  # type: ignore[attr-defined]
    return {
        "bare": bare,
        "loaded": loaded,
        "peak": highest,
        "host": host,
        "device": highest - bare - host,
        "losses": losses,
        "seconds": sorted(seconds)[len(seconds) // 2],
    }


def main() -> None:
    """Run the three and print, or write, what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/offload.md")
    options = parser.parse_args()
    found = conditions("torch", "deepspeed")
    with tempfile.TemporaryDirectory() as scratch:
        shape = {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "vocab_size": 16_000,
            "num_attention_heads": 12,
        }
        model = model_of("llama", **shape, num_key_value_heads=12, head_dim=64, initializer_range=0.02)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(Path(scratch) / "model")
        results = {
            name: on_ranks(2, measure, _plan(Path(scratch), offload)) for name, offload in _CASES.items()
        }
    kept = results["ZeRO-3"][0]
    rows = [
        [
            name,
            *(f"{result[0][key] / 2**20:,.0f} MiB" for key in ("bare", "loaded", "peak", "host", "device")),
            f"{result[0]['seconds']:.2f} s",
            "bit-equal"
            if result[0]["losses"] == kept["losses"]
            else f"{_off(result[0]['losses'], kept['losses']):.1e} off",
        ]
        for name, result in results.items()
    ]
    headings = [
        "",
        "bare process",
        "loaded",
        "peak of the steps",
        "on the host",
        "of a device",
        "a step (median)",
        "losses against ZeRO-3",
    ]
    text = (
        f"{num_parameters:,} parameters, {NUM_STEPS} steps of 252 supervised "
        f"tokens.\n\n{table(headings, rows)}"
    )
    print(text)
    if options.write:
        figures = {name: result[0] for name, result in results.items()}
        print(
            write(
                "offload",
                "ZeRO-3 on 2 ranks",
                f"{sentence(found)}\n\n{text}",
                {"conditions": found, "figures": figures},
                PREFACE,
            )
        )


_CASES = {
    "ZeRO-3": None,
    "optimizer to cpu": ("optimizer", "cpu"),
    "optimizer to files": ("optimizer", "files"),
    "parameters and optimizer to files": ("parameters", "files"),
}


def _plan(scratch: Path, offload: tuple[str, str] | None) -> Plan:
    keys = deepspeed(3)
    keys["zero"] |= {
        "reduce_bucket_size": 7_000_000,
        "allgather_bucket_size": 7_000_000,
        "prefetch_bucket_size": 7_000_000,
    }
    keys["zero"] |= {
        "persistence_threshold": 7680,
        "max_live_parameters": 34_000_000,
        "sub_group_size": 7_000_000,
    }
    if offload:
        what, where = offload
        keys |= {"offload": what, "offload_to": str(scratch) if where == "files" else "cpu"}
        if (what, where) == ("parameters", "files"):
            keys["zero"] |= {"prefetch_bucket_size": 0, "largest_parameter": 16_000 * 768}
    batch = {"global_batch_size": 4, "micro_batch_size": 2, "accumulation_steps": 1, "data_parallel_size": 2}
    return plan_of(scratch / "model", 2, batch=batch, **keys)


def _off(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
