"""Checks of the health of NVIDIA GPUs, from nvidia-smi and the kernel's log."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

from launcher.doctor.finding import Finding, failed, ok, warning
from launcher.errors import first_line
from launcher.runs import kernel

_CHECK = "GPUs"
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.used",
    "memory.total",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "clocks_event_reasons.active",
)
_OLDER = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
"""Older drivers' names of fields."""
_SLOWED_DOWN = {0x8: "the hardware slows it down", 0x20: "too hot", 0x40: "too hot", 0x80: "too little power"}
"""Bits of the reasons for reduced clocks that are a problem; idle GPUs, and limits that people set, are
not."""
_IN_USE_MIB = 1024
_SECONDS = 20.0
_INVALID = re.compile(r'Field "([^"]+)" is not a valid field')


def check() -> tuple[Finding, int]:
    """Return the finding on the GPUs, and their number."""
    if shutil.which("nvidia-smi") is None:
        return ok(_CHECK, "none (no nvidia-smi here)"), 0
    try:
        table = query()
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        late = f"not within {_SECONDS:g} s"
        reason = late if isinstance(error, subprocess.TimeoutExpired) else first_line(error)
        advice = "leave the node out, and tell whoever runs it"
        return failed(_CHECK, f"nvidia-smi does not answer: {reason}", advice), 0
    return judge(table, xids(kernel.kernel_log() or None)), len(table)


def query() -> list[dict[str, str]]:
    """Return a mapping for each GPU, without fields that this driver does not know."""
    names = list(_FIELDS)
    while True:
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        output = done.stdout + done.stderr
        if done.returncode == 0:
            return read(done.stdout, names)
        unknown = _INVALID.search(output)
        if unknown is None or unknown[1] not in names:
            raise ValueError(
                output.strip().splitlines()[-1] if output.strip() else f"it ended with code {done.returncode}"
            )
        names[names.index(unknown[1])] = _OLDER.get(unknown[1], "")
        names = [name for name in names if name]


def read(text: str, names: list[str]) -> list[dict[str, str]]:
    """Return the lines of nvidia-smi as mappings by field."""
    rows = [[value.strip() for value in line.split(",")] for line in text.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def judge(table: list[dict[str, str]], xid: list[str] | None) -> Finding:
    """Return the finding for the worst problem of any GPU."""
    if not table:
        return ok(_CHECK, "none (nvidia-smi lists none)")
    facts = ", ".join(f"{count} x {name}" for name, count in Counter(gpu["name"] for gpu in table).items())
    facts += f", driver {table[0].get('driver_version', '?')}"
    if broken := [f"GPU {gpu['index']}: {reason}" for gpu in table for reason in _broken(gpu)] + [
        f"Xid {entry}" for entry in xid or []
    ]:
        advice = (
            "leave the node out (cluster.exclude), and tell whoever runs it: such a GPU has to be reset or "
            "replaced"
        )
        return failed(_CHECK, f"{facts}; {'; '.join(broken)}", advice)
    if doubtful := [f"GPU {gpu['index']}: {reason}" for gpu in table for reason in _doubtful(gpu)]:
        advice = "see with nvidia-smi who uses it, and whether it stays so"
        return warning(_CHECK, f"{facts}; {'; '.join(doubtful)}", advice)
    return ok(
        _CHECK,
        f"{facts}, no ECC "
        f"error{', the log of Xid errors is not readable' if xid is None else ', no Xid error'}",
    )


def _broken(gpu: dict[str, str]) -> list[str]:
    errors = gpu.get("ecc.errors.uncorrected.volatile.total", "")
    pending = gpu.get("retired_pages.pending", "")
    reasons = [f"{errors} uncorrected ECC errors"] if errors.isdigit() and int(errors) else []
    return [*reasons, "memory pages wait to be retired"] if pending.lower() == "yes" else reasons


def _doubtful(gpu: dict[str, str]) -> list[str]:
    field = "clocks_event_reasons.active"
    reasons, used = gpu.get(field) or gpu.get(_OLDER[field], ""), gpu.get("memory.used", "")
    bits = int(reasons, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", reasons) else 0
    causes = list(dict.fromkeys(why for bit, why in _SLOWED_DOWN.items() if bits & bit))
    return [*causes, f"{used} MiB are in use"] if used.isdigit() and int(used) > _IN_USE_MIB else causes


def xids(log: str | None) -> list[str] | None:
    """Return the Xid errors in the kernel's log, each once; None if the log cannot be read."""
    if log is None:
        return None
    return [f"{number} on {where}" for number, where in kernel.xids(log)]
