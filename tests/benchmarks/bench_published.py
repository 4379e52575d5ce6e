"""The planner's word on runs that others have published: does it fit, and how fast is it.

    python -m tests.benchmarks.bench_published

Nothing is measured here: the cases, with their sources, are in tests/published.py. Writes
docs/benchmarks/published.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from _report import table, write

from tests.published import (
    CASES,
    TITAN_H100,
    ZERO,
    ZERO_STATES,
    Published,
    forecast_of_case,
    fp32_gradients,
    model_states,
)

PREFACE = """# The planner against published runs

`python -m tests.benchmarks.bench_published`: FSDP alone, dense decoders, bf16 with fp32 states, adapters and offloading among
them, as others have run them. Their codes are
not launcher: other attention, other losses, other recomputation. MPT is planned as GPT-2, which keeps more between operators where nothing
is recomputed (those memory figures are in brackets: no verdict of them counts). torchtitan's H100 were held to 500 W and have a memory of
2.4 TB/s in place of 3.35.
"""

HEADER = (
    "run",
    "GiB a GPU, planned",
    "published",
    "planned",
    "tokens/s a GPU, published",
    "planned",
    "planned / published",
    "source",
)


def main() -> None:
    """Plan every case, print, write."""
    rows: list[list[str]] = []
    raw, ratios = [], {"a100-80gb": list[float](), "h100-80gb": list[float]()}
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(CASES):
            said = forecast_of_case(case, Path(scratch) / str(number))
            assert said.speed is not None
            rate = said.speed.tokens_per_second / case.num_gpus
            if case.ran and case.source != TITAN_H100 and case.speed_compares:
                ratios[case.gpu].append(rate / case.tokens_per_second)
            rows.append(row(case, said.footprint.highest.total / 2**30, said.fits, rate))
            raw.append(
                {
                    "case": case.name,
                    "source": case.source,
                    "gib": rows[-1][1],
                    "tokens_per_second": rate,
                    "published": case.tokens_per_second,
                }
            )
        states = [
            [
                stage,
                number,
                given,
                f"{fp32_gradients(stage, number):.2f}",
                f"{model_states(stage, number, Path(scratch) / 'zero'):.2f}",
            ]
            for stage, by_number in ZERO_STATES.items()
            for number, given in by_number.items()
        ]
    sources = "\n".join(f"- {source}" for source in dict.fromkeys(case.source for case in CASES))
    spread = "; ".join(
        f"{gpu}: {len(r)} runs, median {statistics.median(r):.2f}, {min(r):.2f} to {max(r):.2f}"
        for gpu, r in ratios.items()
    )
    text = (
        "Planned over published speed, torchtitan's H100 left out: "
        f"{spread}.\n\n{table(HEADER, rows)}\nSources:\n\n{sources}"
    )
    print(write("published", "FSDP", text, {"rows": raw}, PREFACE))
    note = (
        "launcher adds gradients up in fp32: what is planned is to be the sum of the two figures before it."
    )
    columns = ["stage", "GPUs", "published, GB", "more by fp32 gradients", "planned, GB"]
    print(write("published", "ZeRO", f"{ZERO}. {note}\n\n{table(columns, states)}", {"rows": states}))


def row(case: Published, gib: float, fits: bool, rate: float) -> list[str]:
    """A run's line of the table."""
    memory = f"{gib:.1f}" + (f" ({case.memory_gib:.1f} published)" if case.memory_gib else "")
    verdict = "fits" if fits else "does not fit"
    if not case.memory_compares:
        memory, verdict = f"[{memory}]", "-"
    source = case.source.partition(" ")[0]
    if not case.ran:
        return [case.name, memory, "out of memory", verdict, "-", f"{rate:,.0f}", "-", source]
    ratio = f"{rate / case.tokens_per_second:.2f}"
    return [
        case.name,
        memory,
        "ran",
        verdict,
        f"{case.tokens_per_second:,.0f}",
        f"{rate:,.0f}",
        ratio,
        source,
    ]


if __name__ == "__main__":
    main()
