"""A student of three layers of MiniLM on SST-2: with the teacher fine-tuned here, and without one.

    python -m tests.benchmarks.bench_distillation --data ../shared/data --work /tmp/distillation

Pairs of runs share the seed, the new head and the order of the rows.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Batch
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.runs.wording import gib
from tests.benchmarks._report import conditions, sentence, table, write
from tests.benchmarks.tuning_runs import (
    PREFACE,
    Session,
    command_line,
    common,
    evaluations,
    minilm,
    spread,
    sst2,
)

TITLE = "A student of three layers, with and without its teacher"
KEPT = (1, 3, 5)
"""The layers of MiniLM-L6 that the student keeps, from 0."""
RATE, BATCH, LENGTH = 2e-4, 32, 64
KINDS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "with the teacher's logits": {"temperature": 2.0, "own_loss": 0.3},
    "with its logits and hidden states": {
        "temperature": 2.0,
        "own_loss": 0.3,
        "hidden_states": {"weight": 1.0, "layers": {1: 2, 2: 4, 3: 6}},
    },
}


def main() -> None:
    """Train the teacher, then each kind of student with each seed, and write the section."""
    arguments = command_line(__doc__)
    arguments.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = arguments.parse_args()
    circumstances, session = conditions("torch", "transformers"), Session(options)
    steps = round(217 * options.scale)
    train = session.rows_of("train", sst2(session, "train"))
    held_out = (sst2(session, "dev") + sst2(session, "test"))[: round(2693 * options.scale)]
    evaluation = session.rows_of("held-out", held_out)

    def job(model: str, seed: int) -> dict[str, Any]:
        return common(BATCH, steps, RATE, seed) | {
            "model": {"name": model, "task": "sequence-classification"},
            "data": {
                "train": {"path": train}, "evaluation": {"path": evaluation}, "text": "text", "label": "label",
                "max_length": LENGTH,
            },
        }  # fmt: skip

    def teacher() -> RunDirectory:
        return session.run("teacher", job(minilm(), 17))

    def student(kind: str, seed: int) -> dict[str, Any]:
        start = session.work / "student"
        if not start.exists():
            cut(minilm(), start)
        content, own = job(str(start), seed), KINDS[kind]
        if own is not None:
            content["distillation"] = {"teacher": str(teacher().path)} | own
        run = session.run(f"{kind.replace(' ', '-').replace(chr(39), '')}-{seed}", content)
        last = evaluations(run)[-1]
        return {key: last[key] for key in ("accuracy", "loss")}

    rows: dict[str, dict[str, Any]] = {}
    if (own := session.row("teacher", lambda: dict(evaluations(teacher())[-1]))) is not None:
        rows["the teacher, 6 layers"] = {"17": own}
    for seed in options.seeds:
        for kind in options.kinds:
            row = session.row(
                f"{list(KINDS).index(kind)}-{seed}", lambda kind=kind, seed=seed: student(kind, seed)
            )
            if row is not None:
                rows.setdefault(kind, {})[str(seed)] = row
    memory = [
        row
        for kind in options.kinds
        if (
            row := session.row(
                f"memory-{list(KINDS).index(kind)}",
                lambda kind=kind: measured(session, kind, options.seeds[0]),
            )
        )
    ]
    shown = [
        [name, len(own), *(spread([row[key] for row in own.values()], 4) for key in ("accuracy", "loss"))]
        for name, own in rows.items()
    ]
    text = (
        f"{sentence(circumstances)}\n\nThe student is layers {', '.join(map(str, KEPT))} of MiniLM-L6 (from 0) with a new head; the teacher is the whole of it, "
        f"fine-tuned here on the same rows. 2 ranks, FSDP, bf16, {steps} steps of {BATCH} (one epoch of SST-2), AdamW at {RATE:g} (linear, warm-up "
        f"0.1, weight decay 0.01); temperature 2, `own_loss: 0.3`. Accuracy and the task's own loss on the {len(held_out):,} rows of dev and "
        f"test after the last step.\n\n{table(['', 'seeds', 'accuracy', 'loss'], shown)}\n{compared(rows)}\n"
        f"Peak memory of a rank in a step, by the allocator's own events, against the planner's figure for the same lengths "
        f"({BATCH // 2} samples of {LENGTH} tokens a rank):\n\n"
        + table(["", "planned", "measured", "planned / measured"],
                [[one["kind"], gib(one["planned"]), gib(one["measured"]), f"{one['planned'] / one['measured']:.3f}"] for one in memory])
    )  # fmt: skip
    print(text if options.dry else write("tuning", TITLE, text, rows | {"memory": memory}, PREFACE))


def cut(model: str, target: Path) -> None:
    """Write the student: some of the model's layers."""
    from torch import nn
    from transformers import AutoModel, AutoTokenizer

    own: Any = AutoModel.from_pretrained(model)
    own.encoder.layer = nn.ModuleList([own.encoder.layer[number] for number in KEPT])
    own.config.num_hidden_layers = len(KEPT)
    own.save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)


def compared(rows: dict[str, dict[str, Any]]) -> str:
    """Return the differences from the student alone, by seed."""
    lines = []
    for kind in list(KINDS)[1:]:
        seeds = [seed for seed in rows.get(kind, {}) if seed in rows.get("alone", {})]
        differences = [rows[kind][seed]["accuracy"] - rows["alone"][seed]["accuracy"] for seed in seeds]
        if differences:
            each = ", ".join(f"{one:+.4f}" for one in differences)
            noise = (
                f", standard error {stdev(differences) / len(differences) ** 0.5:.4f}"
                if len(differences) > 1
                else ""
            )
            lines.append(
                f"- {kind}: accuracy {mean(differences):+.4f} against alone with the same seed ({each}){noise}."
            )
    return "\n".join(lines) + "\n"


def measured(session: Session, kind: str, seed: int) -> dict[str, Any]:
    """Return the peak of a step of a run's own plan: planned, and measured on the rank with the most."""
    from tests.benchmarks.bench_memory import settled
    from tests.benchmarks.memory_pool import World
    from tests.benchmarks.memory_ranks import Request, measure

    run = RunDirectory(session.work / f"{kind.replace(' ', '-').replace(chr(39), '')}-{seed}")
    plan = Plan.read(run.plan_file)
    lengths = (LENGTH,) * plan.batch.micro_batch_size
    program = Profiles(starts=True).find(plan)
    assert not isinstance(program, Unknown)
    planned = Estimator(plan, program, Batch(lengths, True)).footprint().phase("steady step").peak
    if plan.distillation is not None:
        own = plan.distillation.model_copy(update={"teacher": str(run.path / "teacher"), "checkpoint": None})
        plan = plan.model_copy(update={"distillation": own})
    world = World(plan.mesh.world_size)
    try:
        results = settled(world, measure, Request(plan, lengths))
    finally:
        world.close()
    return {"kind": kind, "planned": planned, "measured": max(one["peaks"]["steady step"] for one in results)}


if __name__ == "__main__":
    main()
