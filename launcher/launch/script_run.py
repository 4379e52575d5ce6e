"""A user's own script, checked before it starts, and the environment that it reads."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.render.script_files import files
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import RUN_VARIABLE

ENTRY = "launcher.training.script_entry"
_READ_BY_SCRIPTS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def script_command(script: Path, arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the script's absolute path and its arguments. Raises ConfigurationError if it is not a Python
    file."""
    try:
        source = script.read_bytes()
    except FileNotFoundError:
        there = [path.name for path in script.parent.glob("*.py")] if script.parent.is_dir() else []
        near = difflib.get_close_matches(script.name, there, n=1)
        raise _refused(
            script, "no such file" + (f"; the nearest there is {near[0]}" if near else "")
        ) from None
    except IsADirectoryError:
        raise _refused(script, "a directory; name the script in it") from None
    except OSError as error:
        raise _refused(script, f"cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, str(script), "exec")
    except SyntaxError as error:
        raise _refused(
            script, f"not Python: {error.msg}" + (f" (line {error.lineno})" if error.lineno else "")
        ) from None
    except (ValueError, RecursionError) as error:
        raise _refused(script, f"not Python: {error}") from None
    return str(script.absolute()), *arguments


def _refused(script: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(Problem("--script", str(script), reason))


def script_variables(run: RunDirectory, plan: Plan, attempt: int) -> dict[str, str]:
    """Return the variables that launcher itself sets for a script; the agent adds Accelerate's."""
    variables = {RUN_VARIABLE: str(run.path), "LAUNCHER_ATTEMPT": str(attempt)}
    if plan.mesh.device == "cpu":
        # An existing GPU is not used, and Accelerate shards all the same.
        variables |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    return variables


def write_configuration(run: RunDirectory, plan: Plan) -> None:
    """Write the configuration files that the ranks read into RUN/rendered."""
    directory = configuration(run).parent
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files(plan, str(directory)).items():
        write_atomically(directory / name, text)


def configuration(run: RunDirectory) -> Path:
    """Return the path of Accelerate's configuration for the run's script."""
    return run.path / "rendered" / "accelerate.yaml"


def accelerate_variables(config: Path, precision: str) -> dict[str, str]:
    """Return the environment variables that `accelerate launch --config_file` would set, computed by
    Accelerate's own functions.

    For the agent, which has imported torch anyway. `precision` is an argument because the file must not hold it
    with DeepSpeed.
    """
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch.launch_command_parser().parse_args(["--config_file", str(config), "script"])
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    # torchrun sets ranks and addresses; with one machine and any free port Accelerate does not check them.
    arguments.num_machines, arguments.main_process_port = 1, 0
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        variables = prepare_deepspeed_cmd_env(arguments)[1]
        variables["ACCELERATE_MIXED_PRECISION"] = "no" if precision == "fp32" else precision
    else:
        variables = prepare_multi_gpu_env(arguments)
        if arguments.use_cpu and not arguments.use_fsdp:
            variables["ACCELERATE_USE_CPU"] = "true"
    return {name: value for name, value in sorted(variables.items()) if name.startswith(_READ_BY_SCRIPTS)}


def apply_configuration(run: RunDirectory, attempt: Path) -> None:
    """Set, in the agent, the configuration's variables for the ranks, and record them in the attempt's
    directory."""
    variables = accelerate_variables(configuration(run), Plan.read(run.plan_file).precision)
    write_atomically(attempt / "accelerate.json", json.dumps(variables, indent=2) + "\n")
    os.environ.update(variables)
