"""The flags of torchrun, deepspeed and `accelerate launch`, read as engine, nodes and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.importing import accelerate
from launcher.importing.reading import Reading
from launcher.plain_files import read_bytes

_SWITCHES = {
    "multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "cpu", "tpu", "module", "m", "no_python",
    "debug", "quiet", "same_network", "standalone", "no_ssh", "force_multi", "enable_cpu_affinity",
    "use_mps_device", "use_parallelism_config", "no_local_rank", "run_path", "enable_elastic_training",
    "save_pid", "bind_cores_to_rank", "q", "tpu_cluster", "no_tpu_cluster", "dynamo_use_fullgraph",
    "dynamo_use_dynamic", "dynamo_use_regional_compilation", "no_ssh_check", "enable_each_rank_log",
    "virtual_local_rank", "tpu_use_sudo", "downcast_bf16", "use_env", "fp8_use_autocast_during_eval", "h",
    "help", "u",
}  # fmt: skip
"""Flags of the launchers that take no value."""
_STARTING = {
    "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "rdzv_conf", "max_restarts",
    "monitor_interval", "start_method", "role", "log_dir", "node_rank", "master_addr", "master_port",
    "local_addr", "redirects", "tee", "hostfile", "include", "exclude", "num_nodes", "num_gpus",
    "num_cpu_threads_per_process", "launcher", "launcher_args", "deepspeed_multinode_launcher",
    "deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter",
}  # fmt: skip
PLACES = {
    "main_process_ip", "main_process_port", "machine_rank", "rdzv_endpoint", "rdzv_id", "rdzv_backend",
    "rdzv_conf", "node_rank", "master_addr", "master_port", "local_addr", "gpu_ids", "output_dir",
    "logging_dir", "run_name", "cache_dir", "local_rank", "log_dir",
}  # fmt: skip
"""Arguments for addresses, directories and names, which have no effect on what is computed."""
COUNTS = {
    **dict.fromkeys(("num_machines", "nnodes", "num_nodes"), "mesh.nodes"),
    **dict.fromkeys(("num_processes", "nproc_per_node", "num_gpus"), "mesh.ranks_per_node"),
}
"""Arguments for numbers of nodes and ranks -> the key that facts from `#SBATCH` lines have."""
_SHORT = {"H": "hostfile", "i": "include", "e": "exclude", "r": "redirects", "t": "tee"}


def flags_of(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a launcher's own flags, and the words after them: the script and its arguments."""
    flags: dict[str, Any] = {}
    index = 0
    while index < len(words) and words[index].startswith("-") and len(words[index]) > 1:
        name, equals, value = words[index].lstrip("-").partition("=")
        name = _SHORT.get(name, name.replace("-", "_"))
        if equals:
            flags[name] = value
        elif name in _SWITCHES:
            flags[name] = True
        elif index + 1 < len(words):
            index += 1
            flags[name] = words[index]
        index += 1
    return flags, words[index:]


def without_variables(arguments: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Return the arguments without those whose values contain variables that only the shell knows."""
    kept = {}
    for key, value in arguments.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        if key in PLACES and ("$" in text or "`" in text):
            why = "launcher finds its own addresses and ports, and Slurm's nodes"
            reading.ignore(f"--{key}", text[:60], why)
            reading.unknown.add(key)
        elif "$" in text or "`" in text:
            reading.unknown.add(key)
            why = "the shell fills this in; nothing is executed here, so write the value yourself"
            reading.fill_in(f"--{key}", text[:60], why)
        else:
            kept[key] = value
    return kept


def of_accelerate(flags: dict[str, Any], reading: Reading) -> None:
    """Record the flags of `accelerate launch`, whose names are mostly the keys of its YAML file."""
    reading.lacks_engine |= "$" in str(flags.get("config_file", ""))
    flags = without_variables(flags, reading)
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
        if key in _STARTING:
            continue
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
        elif key not in ("module", "m", "no_python", "quiet"):
            content[key] = value
    if (
        content.get("distributed_type") != "DEEPSPEED"
        and (steps := reading.count(deepspeed, "gradient_accumulation_steps")) is not None
    ):
        reading.record("batch.accumulation_steps", steps, "gradient_accumulation_steps")
        del deepspeed["gradient_accumulation_steps"]
    if "distributed_type" not in content and (fsdp or deepspeed) and file is None:
        content["distributed_type"] = "NO"
    content |= {
        name: wanted
        for name, wanted in (
            ("fsdp_config", fsdp),
            ("deepspeed_config", deepspeed),
            ("parallelism_config", parallel),
        )
        if wanted
    }
    if "distributed_type" in content:
        accelerate.read(content, reading)
    else:
        accelerate.places(content, reading)


def of_torchrun(flags: dict[str, Any], reading: Reading) -> None:
    """Record the numbers of nodes and ranks that torchrun starts."""
    flags = without_variables(flags, reading)
    if ":" in str(flags.get("nnodes", "")):
        text = "launcher has a fixed number of nodes; taken: the largest"
        reading.cannot_say("nnodes", flags["nnodes"], text)
        flags["nnodes"] = str(flags["nnodes"]).rpartition(":")[2]
    if flags.get("nproc_per_node") in ("gpu", "auto", "cpu"):
        text = "left to `launcher plan`, which counts the GPUs"
        reading.change("nproc_per_node", flags.pop("nproc_per_node"), text)
    _counted(flags, "nnodes", "nproc_per_node", "torchrun", reading)


def of_deepspeed(flags: dict[str, Any], reading: Reading) -> None:
    """Record the numbers of nodes and ranks that `deepspeed` starts, from its numbers, from `--include
    HOST:SLOT,SLOT@HOST`, or from a host file."""
    flags = without_variables(flags, reading)
    if "num_accelerators" in flags:
        flags["num_gpus"] = flags.pop("num_accelerators")
    if flags.get("num_gpus") == "-1":
        flags.pop("num_gpus")
    slots = _hosts(str(flags["hostfile"]), reading) if "hostfile" in flags else {}
    option = "hostfile" if "hostfile" in flags else "include"
    if "include" in flags:
        option = "include"
        named = _filter(str(flags["include"]))
        slots = {host: len(numbers) if numbers else slots.get(host, 0) for host, numbers in named.items()}
    elif "exclude" in flags:
        named = _filter(str(flags["exclude"]))
        slots = {
            host: count - len(named.get(host, ())) for host, count in slots.items() if named.get(host, [0])
        }
        if not slots:
            text = (
                "leaves out of a file of hosts that is not here: write cluster.nodes and "
                "cluster.gpus_per_node"
            )
            reading.fill_in("--exclude", flags["exclude"], text)
    if slots:
        counts = set(slots.values())
        if len(slots) > 1 or "num_nodes" not in flags:
            flags.setdefault("num_nodes", str(len(slots)))
        if len(counts) > 1:
            text = f"as many on each node in launcher; taken: {min(counts)} of each"
            reading.cannot_say(
                f"--{option}", ", ".join(f"{host}:{count}" for host, count in slots.items()), text
            )
        if min(counts):
            flags.setdefault("num_gpus", str(min(counts)))
        else:
            reading.fill_in(f"--{option}", flags[option], "names no slots: write cluster.gpus_per_node")
    _counted(
        {key: value for key, value in flags.items() if key not in ("include", "exclude")},
        "num_nodes",
        "num_gpus",
        "deepspeed",
        reading,
    )


def _filter(text: str) -> dict[str, list[str]]:
    """Parse `a:0,1@b` as {a: [0, 1], b: []}: slots by host, an empty list for all slots."""
    slots_by_host: dict[str, list[str]] = {}
    for part in text.split("@"):
        host, _, slots = part.strip().partition(":")
        slots_by_host[host] = [slot for slot in slots.split(",") if slot.strip()]
    return slots_by_host


def _hosts(file: str, reading: Reading) -> dict[str, int]:
    """Return slots by host, from lines `HOST slots=N`; empty, with a remark, if the file is not here."""
    path = next((path for path in (Path(reading.source).parent / file, Path(file)) if path.is_file()), None)
    if path is None:
        reading.fill_in("--hostfile", file, "is not here: write cluster.nodes and cluster.gpus_per_node")
        return {}
    slots_by_host: dict[str, int] = {}
    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        host, _, slots = line.partition("#")[0].strip().partition("slots=")
        if host and slots.strip().isdecimal():
            slots_by_host[host.strip()] = int(slots)
    return slots_by_host


def _counted(flags: dict[str, Any], several: str, per_node: str, starter: str, reading: Reading) -> None:
    reading.take(flags, {several: "mesh.nodes", per_node: "mesh.ranks_per_node"}, Reading.count)
    if rest := [key for key in flags if key not in (per_node, several, "m", "module", "u")]:
        text = f"how {starter} starts processes; launcher finds its own ports, and Slurm's nodes"
        reading.ignore(", ".join(rest), None, text)
