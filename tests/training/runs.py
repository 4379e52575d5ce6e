"""Whole runs of the trainer on tiny models: a run directory made on the spot, and attempts at it on gloo
ranks of this machine."""

from __future__ import annotations

import functools
import json
import os
import pickle
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.runs import events
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.checkpoint.reader import CheckpointReader
from launcher.training.signals import StopRequest
from tests.ports import free_port
from tests.training.plans import plan_of
from tests.training.ranks import CONTEXT
from tests.training.tiny import model_of

WORDS = [f"w{number}" for number in range(120)]
Hook = Callable[[int, StopRequest], None]
"""Called on each rank before training, with the rank and its stop request: where a test injects what shall go
wrong."""


def alter_passes(altered: Callable[[int, dict[str, Any], Callable[[], Any]], Any]) -> None:
    """For a hook: training passes give what `altered(step, batch, forward)` does. Steps count from 1;
    `forward()` is the pass."""
    from launcher.tasks.causal_lm import CausalLM
    from launcher.training.trainer import Trainer

    accumulate, forward = Trainer._accumulate, CausalLM.loss
    now = [0]

    def noted(self: Trainer, batch: Any) -> torch.Tensor:
        now[0] = self.state.step + 1
        return accumulate(self, batch)

    def passing(self: CausalLM, model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        plain = functools.partial(forward, self, model, batch)
        return altered(now[0], batch, plain) if torch.is_grad_enabled() else plain()

    Trainer._accumulate, CausalLM.loss = noted, passing  # type: ignore[method-assign]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, within the vocabulary of the tiny models."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="[UNK]",
        model_input_names=["input_ids"],
    )


def model_directory(
    path: Path, family: str = "llama", auto_class: str = "AutoModelForCausalLM", **changes: Any
) -> Path:
    """A tiny model with its tokenizer."""
    model_of(family, auto_class, **changes).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def texts(num_rows: int, seed: int = 0) -> Iterator[str]:
    """Texts of 2 to 60 words, most of them short, in which a word tells something of the next."""
    generator = random.Random(seed)
    for _ in range(num_rows):
        word, length = generator.randrange(120), min(60, 2 + int(generator.expovariate(1 / 14)))
        words = []
        for _ in range(length):
            words.append(WORDS[word])
            word = (word * 7 + generator.randrange(4)) % 120
        yield " ".join(words)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """JSON lines; the source as a job names it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"path": str(path)}


def write_texts(path: Path, num_rows: int, seed: int = 0, column: str = "text") -> dict[str, str]:
    """Rows of `texts`; the source as a job names it."""
    return write_rows(path, [{column: text} for text in texts(num_rows, seed)])


def plain_data(directory: Path, num_rows: int) -> dict[str, Any]:
    """So many rows to learn from, each a sample."""
    train = write_texts(directory / "train.jsonl", num_rows)
    return {"train": train, "text": "text", "max_length": 64, "num_workers": 1}


def causal_data(directory: Path, **changes: Any) -> dict[str, Any]:
    """200 rows to learn from and 24 held out, packed."""
    directory.mkdir(parents=True, exist_ok=True)
    held_out = write_texts(directory / "evaluation.jsonl", 24, seed=1)
    return {**plain_data(directory, 200), "evaluation": held_out, "packing": True} | changes


def batch_of(world_size: int, micro: int, accumulation: int = 1) -> dict[str, int]:
    """Batch arithmetic of a plan."""
    size = world_size * micro * accumulation
    return {
        "global_batch_size": size,
        "micro_batch_size": micro,
        "accumulation_steps": accumulation,
        "data_parallel_size": world_size,
    }


def plan_for(
    model: Path, data: dict[str, Any], world_size: int = 1, num_steps: int = 6, **changes: Any
) -> Plan:
    """A plan of a few steps. Saves come at the end alone unless `changes` say otherwise."""
    training = {
        "learning_rate": 1e-3,
        "schedule": "constant",
        "warmup": 0,
        "max_steps": num_steps,
    } | changes.pop("training", {})
    checkpoint = {"every": 100_000, "keep_last": 2} | changes.pop("checkpoint", {})
    values: dict[str, Any] = {
        "batch": batch_of(world_size, 4 // world_size),
        "data": data,
        "training": training,
        "checkpoint": checkpoint,
    }
    values["length"] = {"value": num_steps, "unit": "steps"}
    return plan_of(model, world_size, **(values | changes))


def new_run(path: Path, plan: Plan) -> RunDirectory:
    """A run directory as the planner leaves it."""
    path.mkdir(parents=True)
    run = RunDirectory(path)
    replan(run, plan)
    return run


def replan(run: RunDirectory, plan: Plan) -> None:
    """Give a run another plan, with the configuration that DeepSpeed reads."""
    run.plan_file.write_text(plan.to_json(), encoding="utf-8")
    if plan.engine == "deepspeed":
        run.rendered.mkdir(exist_ok=True)
        (run.rendered / "ds_config.json").write_text(json.dumps(deepspeed_config(plan)), encoding="utf-8")


@dataclass
class Attempt:
    """The ranks of one attempt, under way."""

    processes: list[BaseProcess]
    pipes: list[Connection]
    results: list[Any] = field(default_factory=list)

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]

    def join(self, seconds: float = 600) -> None:
        """Wait for the end of every rank; what hangs is killed, and an error."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        for process in self.processes:
            process.join()
        assert not hanging, f"ranks {hanging} were still at it after {seconds} s"

    @property
    def over(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def errors(self) -> list[BaseException | None]:
        """What each rank raised, once all have ended. A rank that was killed counts as ProcessLookupError."""
        self.join()
        return [_received(pipe) for pipe in self.pipes]


def _received(pipe: Connection) -> BaseException | None:
    try:
        return pipe.recv()
    except EOFError:
        return ProcessLookupError("killed")


def start(
    run: RunDirectory,
    world_size: int,
    hook: Hook | None = None,
    stop_at: int | None = None,
    cache: Path | None = None,
    entry: Callable[..., None] | None = None,
) -> Attempt:
    """Start an attempt as torchrun would, with forked processes in the place of new interpreters; of `entry`
    in the place of the trainer."""
    port = free_port()
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "XDG_CACHE_HOME": str(cache or run.path.parent / "cache"),
        "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"],
    }
    attempt = Attempt([], [])
    for rank in range(world_size):
        receiving, sending = CONTEXT.Pipe(duplex=False)
        ranked = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (run, ranked, sending, hook, stop_at, entry)
        process = CONTEXT.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        sending.close()
        attempt.processes.append(process)
        attempt.pipes.append(receiving)
    return attempt


def errors_of(
    run: RunDirectory, world_size: int, hook: Hook | None = None, **options: Any
) -> list[BaseException]:
    """One attempt to its end; what its ranks raised."""
    return [error for error in start(run, world_size, hook, **options).errors() if error is not None]


def finish(run: RunDirectory, world_size: int, hook: Hook | None = None, **options: Any) -> None:
    """One attempt to its end, with the options of `start`; AssertionError with the ranks' errors, if any."""
    errors = errors_of(run, world_size, hook, **options)
    assert not errors, "\n".join(str(error) for error in errors)


def _rank(
    run: RunDirectory,
    environment: dict[str, str],
    pipe: Connection,
    hook: Hook | None,
    stop_at: int | None,
    entry: Callable[..., None] | None,
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    _log_to(run.path / f"rank-{environment['RANK']}.log")
    from launcher.training.attempt import train

    error: BaseException | None = None
    try:
        stop = StopRequest(3000.0)
        if hook:
            hook(int(environment["RANK"]), stop)
        (entry or train)(run, Plan.read(run.plan_file), 1, stop, stop_at=stop_at)
    except BaseException as raised:
        traceback.print_exc()
        error = _portable(raised)
    pipe.send(error)
    pipe.close()
    os._exit(0 if error is None else 1)  # as the entry point does: no peer, thread or destructor holds it


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        error.add_note(traceback.format_exc())
        return error
    except Exception:
        return RuntimeError(traceback.format_exc())


def curve(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """The training record of each step, without what a clock or a memory says. Steps done twice must agree to
    the bit."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "num_samples", "num_tokens", "sample_ids")
    found: dict[int, dict[str, Any]] = {}
    for record in events.read(run.metrics_file):
        if record["kind"] == "train":
            wanted = {key: record[key] for key in kept}
            assert repr(found.setdefault(record["step"], wanted)) == repr(wanted), (
                "a step was repeated with other numbers"
            )
    return found


def named(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    """The events of one name."""
    return [record for record in events.read(run.events_file) if record["event"] == name]


def evaluations(run: RunDirectory) -> dict[int, dict[str, float]]:
    """The metrics of each evaluation by its step."""
    return {
        record["step"]: record["metrics"]
        for record in events.read(run.metrics_file)
        if record["kind"] == "evaluation"
    }


def state(run: RunDirectory, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a whole checkpoint, the newest if none is named."""
    whole = [
        stored for stored in list_checkpoints(run) if not stored.problems and step in (None, stored.step)
    ]
    reader = CheckpointReader(whole[-1].directory)
    return {name: reader.read(name).clone() for name in reader.names}


def changed_by(run: RunDirectory, begun: Path, auto_class: Any) -> set[str]:
    """The tensors that a run's export has other than the model that it began with, by name."""
    export(run, run.path.with_name("export"))
    before, after = (
        auto_class.from_pretrained(path).state_dict() for path in (begun, run.path.with_name("export"))
    )
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """The same tensors, to the bit."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(
            value.view(torch.uint8) if value.dim() else value,
            second[name].view(torch.uint8) if value.dim() else second[name],
        ), name
