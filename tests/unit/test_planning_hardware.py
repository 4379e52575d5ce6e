"""What a machine has: read from files and from a program that stands in for nvidia-smi."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.planner.hardware import detect

CPUINFO = "".join(
    f"processor\t: {i}\nphysical id\t: 0\ncore id\t: {i // 2}\nflags\t\t: fpu amx_bf16\n\n" for i in range(8)
)
ROWS = "0, GPU-aaa, NVIDIA H100 80GB HBM3, 81559, 9.0\n1, GPU-bbb, Tesla T4, 15360, 7.5\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH whose nvidia-smi a test writes."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def program(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_gpus(smi: Path) -> None:
    program(smi, f"printf '{ROWS}'")
    gpus, note = detect.find_gpus()
    assert [(gpu.name, gpu.memory_bytes >> 20, gpu.compute_capability) for gpu in gpus] == [
        ("NVIDIA H100 80GB HBM3", 81559, 9.0),
        ("Tesla T4", 15360, 7.5),
    ]
    assert note == ""


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["Tesla T4"]),
        ("GPU-b,0", ["Tesla T4", "NVIDIA H100 80GB HBM3"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["NVIDIA H100 80GB HBM3"]),
    ],
)
def test_visible_gpus(smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    program(smi, f"printf '{ROWS}'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus, note = detect.find_gpus()
    assert [gpu.name for gpu in gpus] == names
    assert bool(note) == (not names)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'No devices were found'; exit 6", "No devices were found"),
        ("exit 9", "exit code 9"),
        ("exec sleep 600", "did not answer within 0.2 s"),
        ("true", "lists none"),
    ],
)
def test_why_there_is_no_gpu(smi: Path, script: str, said: str) -> None:
    program(smi, script)
    gpus, note = detect.find_gpus(timeout=0.2 if "sleep" in script else 200)
    assert gpus == () and said in note


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect.find_gpus() == ((), "there is no nvidia-smi on this machine")


def test_nvidia_smi_that_cannot_be_started(smi: Path) -> None:
    path = smi / "nvidia-smi"
    path.write_text("not a program")
    path.chmod(0o755)
    gpus, note = detect.find_gpus()
    assert gpus == () and "cannot be started" in note


@pytest.mark.parametrize(
    ("allowed", "quota", "cores"),
    [
        (range(8), "max 100000", 4),
        ({0, 1, 2}, "", 2),
        (range(8), "250000 100000", 2),
        (range(8), "50000 100000", 1),
    ],
)
def test_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], quota: str, cores: int
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed))
    assert detect.count_cores(tmp_path / "cpuinfo", tmp_path) == cores


def test_cores_where_the_system_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert detect.count_cores(tmp_path / "none", tmp_path) == 3
    assert detect.cpu_flags(tmp_path / "none") == frozenset()


def test_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert detect.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "amx_bf16"}


def test_memory_is_within_the_control_group(tmp_path: Path) -> None:
    whole = detect.available_memory(tmp_path)
    assert whole > 0
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert detect.available_memory(tmp_path) == 1000000
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 500000\n")
    assert detect.available_memory(tmp_path) == 1500000
    (tmp_path / "memory.max").write_text("max\n")
    assert detect.available_memory(tmp_path) > 1500000


def test_memory_under_version_1(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("3000000\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("2500000\n")
    assert detect.available_memory(tmp_path) == 500000


def test_detect_sees_this_machine() -> None:
    found = detect.Hardware.detect()
    assert found.num_cores >= 1 and found.memory_bytes > 0
    assert bool(found.gpus) != bool(found.gpu_note)
