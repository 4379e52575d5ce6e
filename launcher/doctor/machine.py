"""Checks that apply to any machine: versions, caches, network, clock."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from launcher.doctor.finding import Finding, failed, ok, warning
from launcher.launch.slurm.network import interfaces, is_loopback
from launcher.runs.doors import INTERFACE_VARIABLES
from launcher.runs.versions import versions as of_packages

_NEEDED = ("torch", "transformers", "accelerate", "datasets", "submitit")
_OPTIONAL = ("deepspeed",)
_SECONDS_TO_ASK = 5.0


def versions() -> dict[str, str]:
    """Return versions by package name; empty for packages that are not installed."""
    return of_packages((*_NEEDED, *_OPTIONAL))


def check_versions(known: Mapping[str, str]) -> Finding:
    """Check that the packages that every run needs are installed."""
    shown = ", ".join(f"{name} {version or 'not installed'}" for name, version in known.items())
    if absent := [name for name in _NEEDED if not known.get(name)]:
        advice = "install launcher's dependencies into this environment"
        return failed("versions", f"{', '.join(absent)} not installed ({shown})", advice)
    return ok("versions", shown)


def cache_directories(environment: Mapping[str, str]) -> dict[str, Path]:
    """Return the cache directories of models and data sets, and of launcher's prepared data."""
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(environment.get("HF_HOME") or cache / "huggingface")
    return {
        "HF cache": Path(environment.get("HF_HUB_CACHE") or home / "hub").expanduser(),
        "launcher's cache": cache / "launcher",
    }


def check_caches(environment: Mapping[str, str]) -> Finding:
    """Check whether files can be created in the caches, or caches that do not exist yet can be created."""
    directories = cache_directories(environment)
    for name, path in directories.items():
        try:
            tempfile.NamedTemporaryFile(dir=nearest(path), prefix=".launcher-doctor-").close()
        except OSError as error:
            variable = "HF_HOME" if name == "HF cache" else "XDG_CACHE_HOME"
            advice = f"set {variable} to a directory that you may write, in cluster.environment too"
            return failed("caches", f"{name} {path}: {error.strerror or error}", advice)
    return ok("caches", ", ".join(f"{name} {path} is writable" for name, path in directories.items()))


def nearest(path: Path) -> Path:
    """Return the directory itself, or its nearest parent that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def check_interface(environment: Mapping[str, str]) -> Finding:
    """Check the interfaces that reach other machines, and that the environment names only existing ones."""
    there = {name: address for name, address in interfaces().items() if not is_loopback(address)}
    for name in INTERFACE_VARIABLES:
        value = environment.get(name, "")
        # NCCL and gloo both accept several, and NCCL also prefixes and exclusions.
        if value.replace("_", "").isalnum() and not any(known.startswith(value) for known in there):
            known = ", ".join(sorted(there)) or "none"
            advice = f"unset {name}, or set one of those"
            return failed(
                "interface", f"{name}={value}, which is no interface here; there are {known}", advice
            )
    if not there:
        advice = "several nodes need a network; one machine does not"
        return warning("interface", "none but the loopback", advice)
    return ok("interface", ", ".join(f"{name} {address}" for name, address in sorted(there.items())))


def check_clock() -> Finding:
    """Check whether the system reports that its clock is synchronised."""
    if shutil.which("timedatectl") is None:
        return ok("clock", "whether it is synchronised is not known (no timedatectl here)")
    try:
        command = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS_TO_ASK
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    if answer == "no":
        advice = "have the system's time service started (chronyd or systemd-timesyncd)"
        return warning("clock", "is not synchronised", advice)
    unknown = "whether it is synchronised is not known (timedatectl does not say)"
    return ok("clock", "is synchronised" if answer == "yes" else unknown)


def own_name() -> str:
    return os.uname().nodename
