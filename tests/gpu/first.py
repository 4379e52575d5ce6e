"""First figures of one GPU: what launcher makes of models of 1, 3 and 8 billion parameters.

python -m tests.gpu.first [--minutes 6] [--rows 4] [--dry]

Each model has made-up weights and is trained for some steps on made-up packed rows by `launcher run`. From the run's own
files: tokens a second over the last steps, the share of the GPU's peak that they are, seconds of a step and of
loading, and memory beside the plan's. What does not fit in the minutes that are left is named, not guessed. Writes
docs/benchmarks/gpu.json and a section of gpu.md. With LAUNCHER_GPU_REHEARSAL=1 tiny models run on a CPU in their
place, and nothing is written.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from launcher.cli.display import peak_rate
from launcher.launch.plan_file import read_plan
from launcher.planner.hardware.detect import Hardware
from launcher.runs import events
from launcher.runs.layout import RunDirectory
from tests.benchmarks._report import conditions, parser, sentence, table, write
from tests.gpu.jobs import DEVICE, IS_REHEARSAL, job, run

PREFACE = """# One GPU

`make gpu-check` makes this page on a machine with a GPU: `tests/gpu/first.py`. Models have made-up weights, as speed and
memory do not depend on what they know. A share of the peak is 6 operations for each parameter and token, and those
of attention (`launcher/training/operations.py`), over the GPU's dense rate in bf16.
"""
LENGTH, NUM_STEPS, NUM_WARM = 4096, 12, 4
"""Tokens of a pack, steps of a run, and steps at its beginning that do not count."""
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}


@dataclass(frozen=True)
class Case:
    """A Llama by its sizes, and what else its job says."""

    name: str
    sizes: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)


def llama(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    """Return the keys of a Llama 3's config that its sizes decide."""
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": tied,
    }  # fmt: skip


LORA = {"adapter": {"rank": 16}}
CASES = (
    Case("1B", llama(2048, 8192, 16, 32, tied=True)),
    Case("8B, LoRA of rank 16", llama(4096, 14_336, 32, 32, tied=False), {"model": LORA}),
    Case("3B", llama(3072, 8192, 28, 24, tied=True)),
)


def make_model(directory: Path, sizes: dict[str, Any], with_weights: bool) -> None:
    """Write a config and a tokenizer of some words. The job makes weights up, but not those beside an adapter: these
    are written too, the same million numbers again and again."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from tests.training.runs import tokenizer

    chosen = sizes | _TINY | {"num_attention_heads": 8} if IS_REHEARSAL else sizes
    config = AutoConfig.for_model(
        "llama", max_position_embeddings=2 * LENGTH, bos_token_id=1, eos_token_id=2, pad_token_id=0, **chosen
    )
    config.architectures = ["LlamaForCausalLM"]
    tokenizer().save_pretrained(directory)
    if not with_weights:
        config.save_pretrained(directory)
        return
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        whole = len(flat) // len(block) * len(block)
        flat[:whole].view(-1, len(block)).copy_(block)
        flat[whole:] = block[: len(flat) - whole] if parameter.dim() > 1 else 1.0
    model.save_pretrained(directory)


def write_texts(path: Path, num_tokens: int) -> None:
    """Write rows of 50 to 2,000 words, so many in all."""
    from tests.training.runs import WORDS

    draw = random.Random(0)

    def rows() -> Iterator[str]:
        left = num_tokens
        while left > 0:
            count = min(left, draw.randint(50, 2000))
            left -= count
            yield json.dumps({"text": " ".join(draw.choices(WORDS, k=count))}) + "\n"

    path.write_text("".join(rows()), encoding="utf-8")


def figures_of(finished: RunDirectory, began: float) -> dict[str, Any]:
    """Return what a finished run came to, that began at a time of day."""
    said = list(events.read(finished.events_file))
    [compared] = [event for event in said if event["event"] == "compared"]
    [training] = [event for event in said if event["event"] == "training"]
    steps = list(events.steps(finished.metrics_file).values())[NUM_WARM:]
    rate = median(step["tokens_per_second"] for step in steps)
    times = [step["time"] for step in steps]
    flops, peak = training.get("flops_per_token"), peak_rate(read_plan(finished))
    phases = ("first step", "steady step")
    return {
        "tokens_per_second": rate,
        "share_of_peak": rate * flops / peak if peak and flops else None,
        "step_seconds": (times[-1] - times[0]) / max(1, len(times) - 1),
        "seconds_to_the_first_step": next(iter(events.steps(finished.metrics_file).values()))["time"] - began,
        "measured_bytes": max(compared["measured"]["phases"][phase] for phase in phases),
        "planned_bytes": max(compared["expected"]["phases"][phase] for phase in phases),
    }


def measure(case: Case, place: Path, rows: int, seconds: float) -> dict[str, Any]:
    """Run a case for at most so many seconds; its figures, or why it has none."""
    length = 64 if IS_REHEARSAL else LENGTH
    model = place / case.name.partition(",")[0]
    beside_adapter = "adapter" in case.sections.get("model", {})
    make_model(model, case.sizes, beside_adapter)
    content = job(DEVICE, place, model, precision="bf16") | {
        "batch": {"global_batch_size": rows},
        "training": {"max_steps": NUM_STEPS, "learning_rate": 1e-4},
    }
    content["model"] |= {"weights": "pretrained" if beside_adapter else "random"} | case.sections.get(
        "model", {}
    )
    content["data"] |= {"max_length": length}
    began = time.time()
    try:
        finished = run(place, "run-" + model.name.lower(), content, seconds=seconds)
    except subprocess.TimeoutExpired:
        return {"left_out": f"not done in the {seconds:.0f} s that were left"}
    except AssertionError as error:
        return {"left_out": str(error).strip().splitlines()[-1]}
    figures = figures_of(finished, began)
    shutil.rmtree(finished.path)  # its checkpoint is as large as the model and Adam's moments
    return figures


def row(name: str, figures: dict[str, Any]) -> list[str]:
    """Return a case's line of the table."""
    if "left_out" in figures:
        return [name, figures["left_out"], "", "", "", ""]
    share = figures["share_of_peak"]
    measured, planned = figures["measured_bytes"] / 2**30, figures["planned_bytes"] / 2**30
    return [
        name,
        f"{figures['tokens_per_second']:,.0f}",
        "unknown" if share is None else f"{share:.1%}",
        f"{figures['step_seconds']:.2f}",
        f"{figures['seconds_to_the_first_step']:.0f}",
        f"{measured:.2f} of {planned:.2f}",
    ]


def main() -> None:
    """Measure all cases, print the table, and write the page."""
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=6, help="for all cases together (default 6)")
    arguments.add_argument("--rows", type=int, default=4, help="packs of a step (default 4)")
    options = arguments.parse_args()
    found = conditions("torch", "transformers")
    gpus = Hardware.detect().gpus
    found["device"] = gpus[0].name if gpus else "no GPU"
    deadline, measured = time.monotonic() + 60 * options.minutes, {}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_texts(place / "rows.jsonl", options.rows * NUM_STEPS * (64 if IS_REHEARSAL else LENGTH))
        for case in CASES:
            left = deadline - time.monotonic()
            measured[case.name] = (
                measure(case, place, options.rows, left) if left > 5 else {"left_out": "no time left"}
            )
            print(case.name, json.dumps(measured[case.name]), flush=True)
    columns = [
        "model",
        "tokens/s",
        "of the peak",
        "a step, s",
        "to the first step, s",
        "GiB, measured of planned",
    ]
    text = f"{sentence(found)} {found['device']}.\n\n" + table(
        columns, [row(name, figures) for name, figures in measured.items()]
    )
    print(text)
    if not (options.dry or IS_REHEARSAL):
        print(
            write(
                "gpu", f"{found['device']}, {found['date']}", text, {"conditions": found, **measured}, PREFACE
            )
        )


if __name__ == "__main__":
    main()
