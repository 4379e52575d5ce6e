"""Try engines and offloading in order, and take the first plan that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from launcher.errors import ConfigurationError
from launcher.job.schema import EngineName, Job, Offload
from launcher.planning import fitting, search
from launcher.planning.fitting import Choice, Room
from launcher.planning.forecast import Trace
from launcher.planning.gpus import on_network
from launcher.planning.hardware import Hardware
from launcher.planning.measured import rates_for, slack_kind
from launcher.planning.memory import TOKENS_PER_PASS, gib
from launcher.planning.plan import Decision, Plan, Refused
from launcher.planning.search import Found
from launcher.runs.machine import Machine

Offloading = Literal["never", "where needed", "only"]
"""What may be offloaded that the job leaves open: nothing; something where nothing fits without; something, as nothing fits without."""
_MOVES: dict[EngineName, tuple[Offload, ...]] = {"fsdp": ("parameters",), "deepspeed": ("optimizer", "parameters")}
"""What each engine can offload, what moves least first."""
_NAMES = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}


@dataclass(frozen=True)
class Alternative:
    """One engine with one thing offloaded."""

    engine: EngineName
    offload: Offload

    def pinned(self, job: Job) -> Job:
        """The job as if it asked for that."""
        memory = {"offload": self.offload} | ({"offload_to": "cpu"} if self.offload == "none" else {})
        return job.model_copy(
            update={"parallel": job.parallel.model_copy(update={"engine": self.engine}), "memory": job.memory.model_copy(update=memory)}
        )

    @property
    def words(self) -> str:
        return _NAMES[self.engine] + ("" if self.offload == "none" else f", {self.offload} offloaded")


def groups(job: Job, first: Plan, side_by_side: bool = False) -> list[list[Alternative]]:
    """What the job leaves open of engine and offloading: FSDP before DeepSpeed, and nothing offloaded before anything.

    Of a group the fastest is taken; a later group only where nothing of the earlier ones fits. `side_by_side` are engines of which both
    were measured here.
    """
    open_still = job.parallel.engine == "auto" and job.parallel.shard != "none" and first.engine == "fsdp"  # DeepSpeed always cuts
    other: list[EngineName] = ["deepspeed"] if open_still else []
    engines: list[EngineName] = [first.engine, *other]
    found = [[Alternative(engine, first.offload)] for engine in engines]
    found = [[one for group in found for one in group]] if side_by_side else found
    if job.memory.offload == "auto" and first.mesh.device == "cuda":
        found += [[Alternative(engine, offload) for offload in _MOVES[engine]] for engine in engines]
    return found


def best(
    job: Job,
    hardware: Hardware,
    first: Plan,
    made_of: Callable[[Job], Plan],
    offloading: Offloading = "where needed",
    trace: Trace | None = None,
    local: bool = True,
    by_speed: bool = True,
) -> Plan:
    """The plan that is taken of all that the job leaves open, or `first` where nothing fits or nothing is known of the model.

    `first` is the plan as the simple rule has it; `made_of` makes it of a job that asks for another engine. `trace` goes by the model's
    real class where the formulas do not know it. `by_speed`: of engines that were both measured the faster one is taken. Not `local`: what
    runs on this machine have shown says nothing of where it will run.
    """
    memory = hardware.rank_memory(first.mesh.device, first.mesh.ranks_per_node)
    knows = fitting.known(first)
    if not memory or not (knows or trace):
        return first
    room = _room(job, hardware, first, memory, local)
    room = room if knows else replace(room, trace=trace)
    if _nothing_open(job, first):
        return first
    refused: list[Refused] = []
    for group in groups(job, first, by_speed and local and _both_measured(first, room)):
        moves = group[0].offload != first.offload
        if offloading == ("never" if moves else "only"):
            continue
        found = []
        for alternative in group:
            one = _look(job, alternative, first, made_of, room)
            refused += one.refused
            if one.choice is not None:
                found.append((alternative, one))
        if found:
            # Another engine than the first has to be worth it.
            alternative, one = min(found, key=lambda pair: pair[1].step * (search.WORTH if pair[0].engine == first.engine else 1.0))
            refused += [_slower(other, result, one) for other, result in found if result is not one]
            beside = next((result.step / one.step for other, result in found if other.engine == first.engine and one.step), None)
            return _settled(job, first, alternative, one, refused, beside)
    return first.model_copy(update={"refused": tuple(refused)})


def _room(job: Job, hardware: Hardware, first: Plan, memory: int, local: bool) -> Room:
    machine = Machine.read()
    rates = rates_for(first, hardware, machine)
    return Room(
        memory_bytes=memory,
        most=max(1, TOKENS_PER_PASS[first.mesh.device] // job.data.max_length),
        micro=None if job.batch.micro_batch_size == "auto" else job.batch.micro_batch_size,
        gpu=rates and on_network(rates, job.cluster.network),
        host_memory_bytes=hardware.memory_bytes,
        slack=machine.slack(slack_kind(first, hardware)) if local else None,
    )


def _both_measured(first: Plan, room: Room) -> bool:
    """Whether the speed model has both engines' own messages for it: between the ranks of one CPU."""
    if room.gpu is None or first.mesh.device != "cpu" or first.mesh.world_size == 1:
        return False
    measured = [{name.partition(" ")[0] for name in kinds} for kinds in room.gpu.engine_seconds.values()]
    return bool(measured) and all(engines == set(_NAMES) for engines in measured)


def _nothing_open(job: Job, first: Plan) -> bool:
    """Whether the job says all that is looked for here; its plan is then taken as it is, whether it fits or not."""
    asked = (job.memory.activation_checkpointing, job.batch.micro_batch_size)
    return "auto" not in asked and len(search.variants(job, first)) == 1 and sum(map(len, groups(job, first))) == 1


def _look(job: Job, alternative: Alternative, first: Plan, made_of: Callable[[Job], Plan], room: Room) -> Found:
    if (alternative.engine, alternative.offload) == (first.engine, first.offload):
        return search.fastest(job, first, room)
    try:
        made = made_of(alternative.pinned(job))
    except ConfigurationError as error:
        problem = error.problems[0]
        return Found(None, (), (Refused(what=alternative.words, why="not possible", reason=f"{problem.key}: {problem.reason}"),))
    return search.fastest(job, made, room)


def _slower(alternative: Alternative, result: Found, taken: Found) -> Refused:
    reason = f"{result.step / taken.step:.2f}x the step" if taken.step else "moves more"
    reason += ", not worth another engine" if result.step < taken.step else ""
    return Refused(what=alternative.words, why="slower", reason=reason)


def _settled(job: Job, first: Plan, alternative: Alternative, found: Found, refused: list[Refused], beside: float | None = None) -> Plan:
    """The plan with what was decided by the formulas in the place of what the simple rule had decided.

    `beside` is the step of the first engine, where it fits too, over this one's.
    """
    assert found.choice is not None
    choice, made = found.choice, found.choice.forecast.plan
    decisions = {decision.key: decision for decision in first.decisions}
    # Of another engine, what the first had to decide about its own no longer holds.
    if made.engine != first.engine:
        decisions = {key: decision for key, decision in decisions.items() if key.startswith("cluster.")}
    decisions |= {decision.key: decision for decision in made.decisions}
    values = _by_formulas(choice) | _placed(job, first, alternative, choice, beside)
    asked = {
        "memory.activation_checkpointing": job.memory.activation_checkpointing,
        "batch.micro_batch_size": job.batch.micro_batch_size,
        "parallel.engine": job.parallel.engine,
        "memory.offload": job.memory.offload,
    }
    decisions |= {key: Decision(key=key, value=value, reason=why) for key, (value, why) in values.items() if asked[key] == "auto"}
    decisions |= {decision.key: decision for decision in found.decided}
    return made.model_copy(update={"decisions": tuple(decisions.values()), "refused": tuple(refused)})


def _by_formulas(choice: Choice) -> dict[str, tuple[str | int, str]]:
    samples = choice.batch.micro_batch_size * choice.batch.accumulation_steps
    return {
        "memory.activation_checkpointing": (choice.way, choice.reason),
        "batch.micro_batch_size": (choice.batch.micro_batch_size, f"divides the {samples} samples of a rank exactly; {choice.limit}"),
    }


def _placed(job: Job, first: Plan, alternative: Alternative, choice: Choice, beside: float | None) -> dict[str, tuple[str | int, str]]:
    """Why this engine and why something is offloaded, where the first thought of was neither."""
    values: dict[str, tuple[str | int, str]] = {}
    if alternative.engine != first.engine:
        where = "" if alternative.offload == first.offload else " even with offloading"
        gain = f"{beside:.2f}x as fast as {_NAMES[first.engine]}, by what `launcher bench` measured of both" if beside else ""
        values["parallel.engine"] = (alternative.engine, gain or f"no plan of {_NAMES[first.engine]} fits{where}; this does")
    if first.mesh.device == "cuda" and job.memory.offload == "auto":
        needed = gib(choice.forecast.host_bytes)
        offloaded = f"nothing fits the GPUs without; takes {needed} of each node's own memory, and the way there and back every step"
        values["memory.offload"] = (alternative.offload, "all of it fits the GPUs" if alternative.offload == "none" else offloaded)
    return values
