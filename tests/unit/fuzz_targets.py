"""What is fuzzed: a folder with every kind of file that launcher reads, one of them spoilt, and the commands that read it.

A command may refuse with an error of launcher's own, and must not do anything else: no traceback, no hang.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.cli import main as cli
from launcher.runs.layout import RunDirectory
from tests.unit.checkpoint_files import make_run, write_checkpoint

SECONDS = 300
"""A command that takes longer hangs. Alone it takes one; several helpers may share the machine."""
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip
JOB = {
    "name": "tiny",
    "model": {"name": "./model", "adapter": {"rank": 4, "targets": ["q_proj"]}},
    "data": {"train": {"path": "train.jsonl"}, "evaluation": {"path": "train.jsonl", "limit": 2}, "messages": "messages", "max_length": 64},
    "batch": {"global_batch_size": 12, "micro_batch_size": "auto"},
    "training": {"max_steps": 6, "learning_rate": 1e-3, "evaluate_every": "2 epochs", "early_stopping": {"metric": "loss", "patience": 2}},
    "precision": "fp32",
    "memory": {"activation_checkpointing": "auto", "offload": "none"},
    "parallel": {"engine": "auto", "shard": "full", "replicate": 1},
    "checkpoint": {"every": "15min", "keep_last": 2, "async": True},
    "cluster": {"gpus_per_node": 0, "ranks_per_node": 2, "time_limit": "8h", "environment": {"A": "b"}, "sbatch": {"hint": "x"}},
    "trackers": [],
}  # fmt: skip
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    },
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two", "weight": 1},
]
ROWS = [
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"messages": json.dumps(CHAT)},
]
DEEPSPEED = {
    "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.999]}}, "scheduler": {"type": "WarmupLR", "params": {}},
}  # fmt: skip
ACCELERATE = {
    "distributed_type": "FSDP", "mixed_precision": "bf16", "num_machines": 1, "num_processes": 2,
    "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False},
}  # fmt: skip
TRAINER = {
    "model_name_or_path": "x/y", "output_dir": "out", "learning_rate": 2e-5, "num_train_epochs": 3, "per_device_train_batch_size": 2,
    "bf16": True, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "deepspeed": "ds.json", "report_to": ["wandb"], "use_peft": True,
}  # fmt: skip
SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --time=01:00:00
export LR=1e-5; N=${SLURM_NNODES:-2}
torchrun --nproc-per-node 8 --nnodes $N train.py --learning_rate "$LR" --deepspeed ds.json --bf16 true \\
  --per_device_train_batch_size $((4 / 2))
"""
EVENTS: list[dict[str, Any]] = [
    {"time": 1e9, "event": "planned", "world_size": 2, "digest": "ab"},
    {"time": 1e9, "event": "started", "attempt": 1, "world_size": 2, "nodes": ["n1"]},
    {"time": 1e9, "event": "phase", "phase": "loading", "done": 1, "total": 3, "unit": "rows"},
    {
        "time": 1e9,
        "event": "prepared",
        "role": "train",
        "rows_used": 8,
        "rows_read": 9,
        "num_items": 8,
        "num_tokens": 99,
        "fill": 0.5,
        "dropped": {"empty": 1},
    },
    {
        "time": 1e9,
        "event": "training",
        "first_step": 0,
        "total_steps": 9,
        "num_parameters": 99,
        "flops_per_token": 9.5,
    },
    {"time": 1e9, "event": "evaluated", "step": 2, "metrics": {"loss": 1.5}},
    {
        "time": 1e9,
        "event": "compared",
        "measured": {"tokens_per_second": 9.0, "phases": {"a": 1}},
        "expected": {"phases": {"a": 1}},
    },
    {"time": 1e9, "event": "saved", "step": 2, "seconds": 1.0, "bytes": 99},
    {"time": 1e9, "event": "plan_changed", "changes": [{"key": "a", "before": 1, "after": 2}]},
    {"time": 1e9, "event": "stopping", "signal": "SIGTERM", "grace_seconds": 30.0},
    {
        "time": 1e9,
        "event": "failed",
        "attempt": 1,
        "failure": {"cause": "x", "failure_class": "internal", "exit_code": 1, "rank": 0},
    },
]
METRICS: list[dict[str, Any]] = [
    {"kind": "train", "step": step, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "num_samples": 8, "num_tokens": 99,
     "tokens_per_second": 9.5, "peak_memory_bytes": 10, "data_seconds": 0.1, "sample_ids": "ab", "time": 1e9 + step}
    for step in range(1, 4)
] + [{"kind": "evaluation", "step": 3, "metrics": {"loss": 1.5}}]  # fmt: skip
FAILURE = {
    "time": 1e9, "rank": 0, "host": "n1", "pid": 3, "failure_class": "internal", "exit_code": 1, "cause": "x", "step": 3, "traceback": "",
    "consequence": False, "command": "launcher resume x", "advice": "",
}  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**53, 2**63 - 1, -(2**63), 2**63, 10**40, 10**400, 0.5, -0.0, 1e-300, 1e300, float("inf"),
    float("-inf"), float("nan"), "", " ", "a", "auto", "3", "-1", "1e9", "1e999", "nan", "\0", "\n", "\x1b[31m", "\ud800", "é" * 300, "../..", "/",
    "~", "~nobody/x", "*", "[", "{", "%s", "%", "$(id)", "x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {}}, [1, "a", None], "2 epochs",
    "0s", "99999999999d", "1-2", "2-1", "http://[", "file://x", "hf_abcdefghijklmnopqrst",
)  # fmt: skip
WORDS = (b"[" * 300, b"{" * 300, b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"&a *a", b"!!python/object:x {}", b"<<: *a", b"---\n", b"\r", b"1e999",
         b"NaN", b"Infinity", b"9" * 5000, b"\\ud800", b"\x85", b": ", b"- ", b'"', b"'", b"#", b"|", b"$(", b"${", b"`", b"\n")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A file below the folder, what stands in it, and the commands that read it."""

    file: str
    content: Any
    commands: tuple[tuple[str, ...], ...]

    @property
    def is_text(self) -> bool:
        return isinstance(self.content, str)


_SEEN = (
    ("status", "run", "--json"),
    ("status", "run"),
    ("list", "."),
    ("checkpoint", "list", "run"),
    ("logs", "run"),
)
TARGETS: dict[str, Target] = {
    "job": Target("job.yaml", JOB, (("validate", "job.yaml"), ("plan", "job.yaml"), ("render", "job.yaml", "--out", "rendered"))),
    "config": Target("model/config.json", CONFIG, (("validate", "job.yaml"), ("plan", "job.yaml", "--json"))),
    "tokenizer": Target("model/tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "b"}]},
                        (("validate", "job.yaml"), ("plan", "job.yaml"))),
    "chat": Target("train.jsonl", ROWS, (("validate", "job.yaml"), ("plan", "job.yaml", "--json"))),
    "deepspeed": Target("ds.json", DEEPSPEED, (("import", "ds.json"), ("import", "trainer.json", "--json"), ("diff", "ds.json", "ds.json"))),
    "accelerate": Target("accelerate.yaml", ACCELERATE, (("import", "accelerate.yaml", "--json"),)),
    "trainer": Target("trainer.json", TRAINER, (("import", "trainer.json", "ds.json"),)),
    "script": Target("train.sh", SCRIPT, (("import", "train.sh"),)),
    "events": Target("run/events.jsonl", EVENTS, _SEEN),
    "metrics": Target("run/metrics.jsonl", METRICS, _SEEN),
    "manifest": Target("run/checkpoints/step-00000002/manifest.json", None, (("checkpoint", "list", "run"), ("checkpoint", "list", "run", "--json"),
                       ("checkpoint", "verify", "run"), ("checkpoint", "prune", "run", "--dry-run"), ("status", "run"))),
    "plan": Target("run/plan.json", None, (*_SEEN, ("diff", "run", "run"), ("checkpoint", "prune", "run", "--dry-run"))),
    "failure": Target("run/attempts/0001/failure.json", FAILURE, _SEEN),
    "forecast": Target("run/forecast.json", {"line": "x", "digest": "ab"}, _SEEN),
    "beat": Target("run/attempts/0001/beat-0.json", {"rank": 0, "host": "a", "step": 3, "busy_seconds": 1.0, "memory_bytes": 9, "time": 1e9}, _SEEN),
    "lock": Target("run/.lock", "process 99999999 on nowhere", _SEEN),
    "slurm": Target("run/slurm/job.json", {"job_id": "7", "script": "x", "time": 1e9}, (("status", "run"), ("list", "."))),
    "sweep": Target("sweep/sweep.json", {"format": 1, "points": [["a=1"], ["a=2"]], "metric": "loss", "nproc": None}, (("sweep", "sweep", "--show"),)),
    "profile": Target("profile.yaml", {"cluster": {"partition": "a", "setup": ["true"]}, "limits": {"a": {"max_nodes": 8, "max_time": "2d"}}},
                      (("validate", "with-profile.yaml"),)),
}  # fmt: skip


def written(content: Any, name: str) -> bytes:
    """A content as its file has it: JSON, JSON lines, YAML, or text."""
    if isinstance(content, str):
        return content.encode("utf-8", errors="surrogatepass")
    if name.endswith(".jsonl"):
        return "".join(
            json.dumps(entry) + "\n" for entry in (content if isinstance(content, list) else [content])
        ).encode()
    if name.endswith(".yaml"):
        return yaml.safe_dump(content, sort_keys=False).encode("utf-8", errors="surrogatepass")
    return json.dumps(content).encode()


def make_folder(folder: Path) -> None:
    """Every file as it should be, in the working directory."""
    from launcher.job.load import load
    from launcher.planner.search import plan_job as decide

    for target in TARGETS.values():
        (folder / target.file).parent.mkdir(parents=True, exist_ok=True)
        if target.content is not None:
            (folder / target.file).write_bytes(written(target.content, target.file))
    named = {**JOB, "cluster": {"profile": "./profile.yaml", "gpus_per_node": 0, "ranks_per_node": 2}}
    (folder / "with-profile.yaml").write_text(yaml.safe_dump(named))
    run = RunDirectory(folder / "run")
    run.plan_file.write_text(decide(load(folder / "job.yaml"), 2).to_json())
    (folder / "run/attempts/0001/rank-0.log").write_text("said\n")
    made = make_run(folder / "other")
    (run.path / "run_id").write_text(made.run_id())
    written_at = write_checkpoint(made, 2, {"loss": 1.0})
    (run.path / "checkpoints/step-00000002").rmdir()
    written_at.rename(run.path / "checkpoints/step-00000002")


def content_of(name: str, folder: Path) -> Any:
    """What a target's file holds before it is spoilt."""
    target = TARGETS[name]
    return (
        json.loads((folder / target.file).read_text())
        if target.content is None
        else json.loads(json.dumps(target.content))
    )


def spoil(name: str, content: Any, generator: random.Random) -> bytes:
    """A target's file with wrong values in some places, or with wrong bytes."""
    target = TARGETS[name]
    if not target.is_text and generator.random() < 0.75:
        for _ in range(generator.randint(1, 3)):
            content = _with_junk(content, generator)
        if name == "manifest" and isinstance(content, dict) and generator.random() < 0.8:
            return _signed(content)
        with contextlib.suppress(ValueError, OverflowError, yaml.YAMLError):
            return written(content, target.file)
    raw = bytearray(written(content, target.file))
    for _ in range(generator.randint(1, 4)):
        position, length = generator.randint(0, len(raw)), generator.choice([0, 0, 1, 2, 9, 100])
        kind = generator.randint(0, 3)
        piece = (
            bytes([generator.randrange(256)])
            if kind == 0
            else generator.choice(WORDS)
            if kind < 3
            else bytes(raw[position : position + 50])
        )
        raw[position : position + length] = piece
    return bytes(raw)


def _with_junk(content: Any, generator: random.Random) -> Any:
    """The same content with one value in it, a key, or all of it, changed for junk."""
    if not isinstance(content, (dict, list)) or not content or generator.random() < 0.1:
        return _junk(generator)
    if isinstance(content, dict):
        key = generator.choice(list(content))
        kind = generator.random()
        rest = {other: value for other, value in content.items() if other != key}
        if kind < 0.1:
            return rest
        if kind < 0.2:
            return {**rest, generator.choice(["a", "", "*", "step", "name"]): content[key]}
        return {**content, key: _with_junk(content[key], generator)}
    index = generator.randrange(len(content))
    changed = [_with_junk(content[index], generator)] * generator.choice([0, 1, 1, 1, 2])
    return [*content[:index], *changed, *content[index + 1 :]]


def _junk(generator: random.Random) -> Any:
    junk = generator.choice(JUNK)
    for _ in range(generator.choice([0, 0, 0, 0, 1, 2, 150])):
        junk = [junk] if generator.random() < 0.5 else {"a": junk}
    return junk


def _signed(content: dict[str, Any]) -> bytes:
    """A manifest of wrong content whose hash of itself is right, as a person could write it."""
    from launcher.runs import checkpoints

    content.pop("manifest_xxh3_128", None)
    return checkpoints._canonical({**content, "manifest_xxh3_128": checkpoints._text_hash(content)}).encode()


class Hung(BaseException):
    """A command that did not come to an end."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hung in the main thread after so long."""

    def stop(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(name: str, spoilt: bytes, folder: Path, call: Callable[[list[str]], None] = cli.main) -> float:
    """Run every command that reads a target's spoilt file; the longest time that one took, in seconds.

    Raises what a user would see as a traceback.
    """
    path = folder / TARGETS[name].file
    before = path.read_bytes()
    path.write_bytes(spoilt)
    try:
        return max(_call(command, call) for command in TARGETS[name].commands)
    finally:
        path.write_bytes(before)


def check_replaced(name: str, kind: str, folder: Path) -> None:
    """The same with a pipe, a socket, a device, a directory, or a link to one of them or to nothing, in the place of the file."""
    path = folder / TARGETS[name].file
    before = path.read_bytes()
    path.unlink()
    with contextlib.ExitStack() as stack:
        stack.callback(path.write_bytes, before)
        if kind == "directory":
            path.mkdir()
            stack.callback(path.rmdir)
        else:
            stack.callback(path.unlink)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path.name)
        elif kind != "directory":
            path.symlink_to(
                {"device": "/dev/zero", "link to nothing": "nowhere", "link to itself": path.name}[kind]
            )
        for command in TARGETS[name].commands:
            _call(command, cli.main)


def _call(command: tuple[str, ...], call: Callable[[list[str]], None]) -> float:
    """How long a command took, in seconds, which may refuse, and must not raise nor hang."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    began = time.monotonic()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        limited(SECONDS),
        contextlib.suppress(SystemExit),
    ):
        call(list(command))
    taken = time.monotonic() - began
    said = b"".join(stream.buffer.getvalue() for stream in (out, err))  # type: ignore[attr-defined]
    assert b"Traceback" not in said, said
    return taken
