"""Plan an evaluation or prediction without training: rows per micro-batch, and whether they fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from launcher import tasks
from launcher.errors import OutOfMemoryError
from launcher.planner.dataset.dataset_size import DatasetSizes
from launcher.planner.forecast import Forecast
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.footprint import Footprint
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Batch, Program
from launcher.planner.memory.written_states import StatesAlone
from launcher.planner.plan import BatchPlan, Plan
from launcher.planner.resolve.batch import divisors
from launcher.planner.suggestions import fully_cut
from launcher.planner.target import target_here
from launcher.runs.wording import gib, in_phase
from launcher.tasks.encoder_decoders import EncoderDecoderTask
from launcher.tasks.generation import Evaluation, Generate

_NOTHING_TRAINS = {"optimizer": "sgd", "momentum": 0.0, "moments": "fp32", "ema": None, "l2_sp": None}


Find = Callable[[Plan], Program | Unknown]
"""Returns the program of a plan's model, or why its memory cannot be forecast."""


def plan_evaluation(
    plan: Plan,
    directories: Iterable[str | None],
    profiles: Profiles,
    predicts: bool = False,
    writes_logits: bool = False,
) -> tuple[Plan, str]:
    """Return the plan for evaluating or predicting here, and its memory in words; empty if the memory is
    unknown.

    directories: the models, evaluated one after another; None stands for the plan's own. A micro-batch has as
    many rows as fit, at most the plan's, and the same number for all models. predicts: an encoder-decoder
    generates an answer to each row, whether or not the job's evaluation does. writes_logits: nothing is
    generated, and of a language model no loss is computed, but its last hidden states.

    Raises OutOfMemoryError with the nearest plan that fits, if not even one row fits.
    """
    highest: Forecast | None = None
    find = functools.partial(_writing_logits, profiles) if writes_logits else profiles.find
    for directory in directories:
        of = plan if directory is None else plan.of_directory(directory)
        if writes_logits:
            of = of.model_copy(update={"evaluation": None})
        elif predicts:
            of = _generating(of)
        foreseen = _fitting(of, find)
        if foreseen is None:
            continue
        plan = with_rows(plan, foreseen.plan.batch.micro_batch_size)
        if highest is None or foreseen.footprint.highest.total > highest.footprint.highest.total:
            highest = foreseen
    rows = plan.batch.micro_batch_size
    return plan, "" if highest is None else f"memory: {highest.line()}, {rows} row{'s' * (rows > 1)} a pass"


def with_rows(plan: Plan, rows: int) -> Plan:
    """Return the plan with a micro-batch of this many rows, and no gradient accumulation."""
    size = plan.batch.data_parallel_size
    batch = BatchPlan(
        global_batch_size=rows * size, micro_batch_size=rows, accumulation_steps=1, data_parallel_size=size
    )
    return plan.model_copy(update={"batch": batch})


def measured(plan: Plan, program: Program, batch: Batch | None = None) -> Footprint:
    """Return a rank's memory while a model is loaded and evaluated, without training. FSDP has no optimizer
    then; ZeRO's exists anyway, as it owns the fp32 masters. `batch`: by default the plan's, of the longest
    samples."""
    changes: dict[str, object] = {"distillation": None}
    kept = _NOTHING_TRAINS if plan.zero is None else {"ema": None, "l2_sp": None}
    changes["training"] = plan.training.model_copy(update=kept)
    phases = Estimator(plan.model_copy(update=changes), program, batch).footprint()
    return Footprint((phases.phase("loading"), phases.phase("evaluating")))


def _writing_logits(profiles: Profiles, plan: Plan) -> Program | Unknown:
    program, speaks = profiles.find(plan), tasks.find(plan.task).traits.head == "every-position"
    return StatesAlone.of(plan, program) if speaks and not isinstance(program, Unknown) else program


def _fitting(plan: Plan, find: Find) -> Forecast | None:
    """Return the forecast with the most rows per micro-batch that fit; None if the model's memory cannot be
    forecast. Raises OutOfMemoryError."""
    program, hardware = find(plan), Hardware.detect()
    if isinstance(program, Unknown):
        return None
    rows = reversed(divisors(plan.batch.micro_batch_size))
    tried = [_forecast(with_rows(plan, number), program, hardware) for number in rows]
    fitting = next((one for one in tried if one.fits), None)
    return fitting or _refuse(tried[-1], plan.batch.global_batch_size, find, hardware)


def _generating(plan: Plan) -> Plan:
    evaluation = plan.evaluation or Evaluation()
    if evaluation.generate is None and issubclass(tasks.find(plan.task), EncoderDecoderTask):
        evaluation = evaluation.model_copy(update={"generate": Generate()})
    return plan.model_copy(update={"evaluation": evaluation})


def _forecast(plan: Plan, program: Program, hardware: Hardware) -> Forecast:
    return Forecast(plan, measured(plan, program), target_here(plan, hardware), 0, program, DatasetSizes())


def _refuse(least: Forecast, global_batch_size: int, find: Find, hardware: Hardware) -> Forecast:
    """Raise OutOfMemoryError with the nearest plan that fits."""
    nearest = "nothing near it fits; take a larger device"
    for text, plan in _ways(least.plan, global_batch_size, hardware):
        program = find(plan)
        if not isinstance(program, Unknown) and _forecast(plan, program, hardware).fits:
            nearest = f"the nearest that fits: {text}"
            break
    highest = least.footprint.highest
    largest = max(highest.parts, key=lambda kind: highest.parts[kind])
    raise OutOfMemoryError(
        f"one row a pass needs {least.lack} ({in_phase(highest.name)}; most of it {largest}, "
        f"{gib(highest.parts[largest])}); {nearest}"
    )


def _ways(plan: Plan, global_batch_size: int, hardware: Hardware) -> Iterator[tuple[str, Plan]]:
    """Yield other plans with the options that select them; those that do not change the result come first."""
    mesh, also = plan.mesh, ""
    if plan.zero is not None:
        plan = plan.model_copy(update={"engine": "fsdp", "zero": None, "offload": "none"})
        also = "--set parallel.engine=fsdp --set memory.offload=none "
        yield also.strip(), plan
    if mesh.world_size > 1 and (mesh.dp_replicate > 1 or plan.sharding != "full"):
        plan = fully_cut(plan, 1)
        also += "--set parallel.shard=full --set parallel.replicate=1 "
        yield also.strip(), plan
    # More GPUs need less memory each, and fewer CPU ranks get more of the host memory each.
    more, fewer = range(mesh.world_size + 1, len(hardware.gpus) + 1), range(mesh.world_size - 1, 0, -1)
    for number in more if mesh.device == "cuda" else fewer:
        if global_batch_size % number == 0:
            yield f"{also}--nproc {number}", _on_ranks(plan, number)
    if plan.precision == "fp32":
        yield f"{also}--set precision=bf16", plan.model_copy(update={"precision": "bf16"})
    for length in (plan.data.max_length // 2, plan.data.max_length // 4):
        shorter = plan.data.model_copy(update={"max_length": length})
        text = f"{also}--set data.max_length={length} (longer rows are cut)"
        yield text, plan.model_copy(update={"data": shorter})


def _on_ranks(plan: Plan, number: int) -> Plan:
    sizes = {"ranks_per_node": number, "world_size": number, "dp_shard": number, "dp_replicate": 1}
    batch = plan.batch.model_copy(update={"data_parallel_size": number, "global_batch_size": number})
    return plan.model_copy(update={"mesh": plan.mesh.model_copy(update=sizes), "batch": batch})
