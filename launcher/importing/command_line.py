"""A command line (`accelerate launch`, `torchrun`, `deepspeed`, `python`) taken apart; nothing of it is executed."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePath
from typing import Any

from launcher.importing import accelerate, trainer
from launcher.importing.reading import Reading

_SWITCHES = {
    "multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "cpu", "tpu", "module", "m", "no_python", "debug", "quiet", "same_network",
    "standalone", "no_ssh", "force_multi", "enable_cpu_affinity", "use_mps_device", "use_parallelism_config", "no_local_rank",
    "run_path", "enable_elastic_training", "save_pid", "bind_cores_to_rank", "q", "tpu_cluster", "dynamo_use_fullgraph",
    "dynamo_use_dynamic", "dynamo_use_regional_compilation",
}  # fmt: skip
"""Flags of the launchers that take no value."""
_TORCHRUN = {
    "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "max_restarts", "monitor_interval", "start_method",
    "role", "log_dir", "node_rank", "master_addr", "master_port", "local_addr", "redirects", "tee", "hostfile", "include", "exclude",
    "num_nodes", "num_gpus", "num_cpu_threads_per_process", "launcher", "launcher_args", "deepspeed_multinode_launcher",
}  # fmt: skip
_STARTERS = ("accelerate", "torchrun", "deepspeed", "python", "accelerate-launch")


def split(text: str, reading: Reading) -> list[str]:
    """The words of the first line of a script that starts a training; empty, with a problem, where there is none."""
    joined = re.sub(r"\\\r?\n", " ", text)
    for line in joined.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            if any(starter in line for starter in _STARTERS):
                reading.refuse("command line", line.strip(), f"cannot be split into words: {error}")
                return []
            continue
        words = words[_begin(words) :] if words else []
        if words and _starter(words):
            return words
    reading.refuse("command line", None, f"no line here starts a training; one begins with {', '.join(_STARTERS)}")
    return []


def _begin(words: list[str]) -> int:
    """Where the program is, behind `srun ...`, `exec` and assignments."""
    for index, word in enumerate(words):
        if _starter([word]):
            return index
    return 0


def _starter(words: list[str]) -> str:
    name = PurePath(words[0]).name
    return next(
        (starter for starter in ("accelerate-launch", *_STARTERS) if name == starter or re.fullmatch(rf"{starter}[\d.]*", name)), ""
    )


def read(words: list[str], reading: Reading) -> None:
    """Say what a command line says: the launcher's flags, then the script's."""
    if not words:
        return
    starter, rest = _starter(words), words[1:]
    if starter == "accelerate" and rest[:1] == ["launch"]:
        starter, rest = "accelerate-launch", rest[1:]
    if starter == "python":
        rest = rest[1:] if rest[:1] == ["-u"] else rest
        if rest[:2] == ["-m", "torch.distributed.run"] or rest[:2] == ["-m", "torch.distributed.launch"]:
            starter, rest = "torchrun", rest[2:]
        elif rest[:2] == ["-m", "accelerate.commands.launch"]:
            starter, rest = "accelerate-launch", rest[2:]
    flags, script = _launcher_flags(rest, starter)
    if starter == "accelerate-launch":
        _accelerate(flags, reading)
    elif starter in ("torchrun", "deepspeed"):
        _ranks(flags, starter, reading)
    if script:
        reading.remark("ignored", "script", script[0], "launcher brings its own loop; `launcher run --script` would start yours")
        trainer.read(_without_variables(_script_arguments(script[1:]), reading), reading)


def _launcher_flags(words: list[str], starter: str) -> tuple[dict[str, Any], list[str]]:
    """The launcher's own flags, and what follows: the script and its arguments."""
    flags: dict[str, Any] = {}
    index = 0
    while index < len(words) and words[index].startswith("-") and len(words[index]) > 1:
        name, equals, value = words[index].lstrip("-").partition("=")
        name = name.replace("-", "_")
        if equals:
            flags[name] = value
        elif name in _SWITCHES or (starter == "python" and name != "m"):
            flags[name] = True
        elif index + 1 < len(words):
            index += 1
            flags[name] = words[index]
        index += 1
    return flags, words[index:]


def _script_arguments(words: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` (true), `--name a b` (a list); words that belong to no name are left out."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
            name = "" if equals else name
        elif name:
            before = found[name]
            found[name] = word if before is True else [*before, word] if isinstance(before, list) else [before, word]
    return found


def _without_variables(arguments: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Values that the shell would have filled in are not known here."""
    kept = {}
    for key, value in arguments.items():
        text = " ".join(value) if isinstance(value, list) else str(value)
        if "$" in text or "`" in text:
            reading.remark(
                "fill in", f"--{key}", text[:40], "the shell fills this in; nothing is executed here, so write the value yourself"
            )
        else:
            kept[key] = value
    return kept


def _accelerate(flags: dict[str, Any], reading: Reading) -> None:
    """`accelerate launch` flags are the keys of its YAML, in other places."""
    flags = _without_variables(flags, reading)
    content: dict[str, Any] = {}
    if (file := flags.pop("config_file", None)) is not None:
        reading.follow.append(str(file))
    for switch, kind in (
        ("use_fsdp", "FSDP"),
        ("use_deepspeed", "DEEPSPEED"),
        ("use_megatron_lm", "MEGATRON_LM"),
        ("multi_gpu", "MULTI_GPU"),
    ):
        if flags.pop(switch, None):
            content["distributed_type"] = kind
    if flags.pop("cpu", None):
        content["use_cpu"] = True
    fsdp, deepspeed, parallel = {}, {}, {}
    for key, value in flags.items():
        if key.startswith("fsdp_"):
            fsdp[key] = value
        elif key in ("zero_stage", "gradient_accumulation_steps", "gradient_clipping") or key.startswith(
            ("offload_", "deepspeed_", "zero3_")
        ):
            deepspeed[key] = value
        elif key.startswith("parallelism_config_"):
            parallel[key] = value
        elif key == "dynamo_backend":
            content["dynamo_config"] = {"dynamo_backend": value}
        elif key not in ("module", "m", "no_python", "quiet", *_TORCHRUN):
            content[key] = value
    if "distributed_type" not in content and (fsdp or deepspeed) and file is None:
        content["distributed_type"] = "NO"
    content |= {
        name: made for name, made in (("fsdp_config", fsdp), ("deepspeed_config", deepspeed), ("parallelism_config", parallel)) if made
    }
    if "distributed_type" in content:
        accelerate.read(content, reading)
    else:
        accelerate.places(content, reading)


def _ranks(flags: dict[str, Any], starter: str, reading: Reading) -> None:
    """torchrun's and deepspeed's own flags: how many nodes and ranks."""
    flags = _without_variables(flags, reading)
    per_node, several = ("nproc_per_node", "nnodes") if starter == "torchrun" else ("num_gpus", "num_nodes")
    if ":" in str(flags.get(several, "")):
        reading.remark("cannot be said", several, flags[several], "launcher has a fixed number of nodes; taken: the largest")
        flags[several] = str(flags[several]).rpartition(":")[2]
    if flags.get(per_node) in ("gpu", "auto", "cpu"):
        reading.remark("changes meaning", per_node, flags.pop(per_node), "left to `launcher plan`, which counts the GPUs")
    nodes = reading.count(flags, several)
    ranks = reading.count(flags, per_node)
    if nodes is not None:
        reading.say("mesh.nodes", nodes, several)
    if ranks is not None:
        reading.say("mesh.world_size", ranks * (nodes or 1), per_node)
    if rest := [key for key in flags if key not in (per_node, several)]:
        text = f"how {starter} starts processes; launcher finds its own ports, and Slurm's nodes"
        reading.remark("ignored", ", ".join(rest), None, text)
