"""Too large for one rank: each process may have half of what the training state takes, by the operating
system's own limit.

FSDP and ZeRO-3 train on 4 ranks; one rank runs out of memory and is told what would fit. The figures go to
docs/benchmarks/too_large.md with LAUNCHER_WRITE_FIGURES=1.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from launcher.errors import OutOfMemoryError
from launcher.runs.layout import RunDirectory
from launcher.runs.wording import gib
from tests.benchmarks import _report
from tests.training.runs import curve, named, tokenizer, write_texts
from tests.training.tiny import config_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_STEPS = 2
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""Small layers, so that the few that are whole at a time are little beside the state; a quarter of a matrix
has 1 MiB."""
_THREAD_STACK = 1 << 20
"""A process has some thirty threads, and by default each of their stacks counts with 8 MiB of which it uses a
few KiB."""
FIGURES: dict[str, Any] = {}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job over a model of 256 million parameters in several files; what its training state takes is in
    FIGURES."""
    directory = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of("llama", **SHAPE, head_dim=128, initializer_range=0.02)
    )
    FIGURES["num_parameters"] = model.num_parameters()
    model.save_pretrained(directory / "model", max_shard_size="200MB")
    assert len(list((directory / "model").glob("*.safetensors"))) > 4
    tokenizer().save_pretrained(directory / "model")
    rows = write_texts(directory / "train.jsonl", 40)
    content = {
        "name": "large",
        "model": {"name": str(directory / "model")},
        "data": {"train": rows, "text": "text", "max_length": 32, "packing": True, "num_workers": 1},
        "batch": {"global_batch_size": 4, "micro_batch_size": 1},
        "training": {"max_steps": NUM_STEPS, "learning_rate": 1e-4, "schedule": "constant", "warmup": 0},
        "precision": "fp32",
        "memory": {"activation_checkpointing": "full"},
        "cluster": {"threads_per_rank": 1},
        "checkpoint": {"every": 1000},
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module", autouse=True)
def _figures() -> Iterator[None]:
    yield
    if os.environ.get("LAUNCHER_WRITE_FIGURES") == "1" and FIGURES.keys() >= {"fsdp", "deepspeed"}:
        _write_figures()


def state_bytes() -> int:
    return int(FIGURES["num_parameters"]) * 16


class Watch:
    """The most anonymous memory, and the most that the limit counted, of each rank of a running launcher."""

    def __init__(self, pid: int) -> None:
        self.peaks: dict[int, dict[str, int]] = {}
        self._pid, self._done = pid, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.05):
            for pid in _report.descendants(self._pid):
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    text = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                if words[1:4] != ["-u", "-m", "launcher.training.entry"]:
                    continue
                peak = self.peaks.setdefault(pid, {})
                for key, value in re.findall(r"^(RssAnon|VmData):\s+(\d+) kB", text, re.MULTILINE):
                    peak[key] = max(peak.get(key, 0), int(value) * 1024)

    def largest(self) -> dict[str, int]:
        self._done.set()
        self._thread.join()
        return {key: max(peak[key] for peak in self.peaks.values()) for key in ("RssAnon", "VmData")}


def launch(job: Path, run: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, int]]:
    """`launcher run` with every process of it capped; how it ended, and the peaks of the largest rank."""
    cap = state_bytes() // 2
    command = [
        "prlimit",
        f"--data={cap}:{cap}",
        f"--stack={_THREAD_STACK}:",
        sys.executable,
        "-m",
        "launcher.cli.main",
    ]
    process = subprocess.Popen(
        [*command, "run", str(job), "--run-dir", str(run), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "LAUNCHER_WARM": "0",
        },  # each rank's memory by itself, and ranks that are known by their command
    )
    watch = Watch(process.pid)
    output, _ = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, ""), watch.largest()


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_four_ranks_train_what_half_the_memory_would_not_hold(engine: str, job: Path, tmp_path: Path) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # The plan leaves a tenth of a rank's memory free, which here is part of what has to do.
    ended, peaks = launch(
        job, tmp_path / "run", "--nproc", "4", "--force", "--set", f"parallel.engine={engine}"
    )
    run = RunDirectory(tmp_path / "run")
    assert ended.returncode == 0, ended.stdout + (run.attempt(1) / "rank-0.log").read_text()[-3000:]
    assert run.finished and len(curve(run)) == NUM_STEPS and len(named(run, "saved")) == 1
    assert peaks["RssAnon"] <= peaks["VmData"] <= state_bytes() // 2
    FIGURES[engine] = peaks | {"losses": [record["loss"] for record in curve(run).values()]}
    print(
        f"{engine}: a rank had {gib(peaks['RssAnon'])} of anonymous memory, {gib(peaks['VmData'])} as "
        "the limit counts"
    )
    if FIGURES.keys() >= {"fsdp", "deepspeed"}:
        torch.testing.assert_close(
            torch.tensor(FIGURES["deepspeed"]["losses"]),
            torch.tensor(FIGURES["fsdp"]["losses"]),
            rtol=1e-5,
            atol=0,
        )


def test_one_rank_runs_out_of_memory_and_is_told_what_would_fit(job: Path, tmp_path: Path) -> None:
    ended, _ = launch(job, tmp_path / "run", "--nproc", "1", "--force")
    run = RunDirectory(tmp_path / "run")
    failure = json.loads((run.attempt(1) / "failure.json").read_text())
    assert (ended.returncode, failure["failure_class"]) == (
        OutOfMemoryError.exit_code,
        OutOfMemoryError.failure_class,
    ), failure
    assert not run.finished
    assert failure["command"].endswith("--nproc 4")
    assert re.fullmatch(
        r"the model and its training state take about 3.\d GiB of a rank, which has 1.9 GiB; cut over "
        r"4 ranks it is 1.\d GiB",
        failure["advice"],
    ), failure["advice"]
    (said,) = [line for line in ended.stdout.splitlines() if line.startswith("out-of-memory: rank 0")]
    assert failure["advice"] in said and said.endswith(failure["command"])
    FIGURES["one"] = {"step": failure["step"], "said": said}


def test_the_limit_is_what_stops_a_process(job: Path) -> None:
    """The cap is the system's, and counts memory that is asked for."""
    cap = state_bytes() // 2
    code = (
        f"import resource; assert resource.getrlimit(resource.RLIMIT_DATA)[0] == {cap}; bytearray({cap} + 1)"
    )
    done = subprocess.run(
        ["prlimit", f"--data={cap}:{cap}", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MemoryError" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def _write_figures() -> None:
    state = state_bytes()
    rows = [
        (
            name,
            gib(FIGURES[key]["RssAnon"]),
            gib(FIGURES[key]["VmData"]),
            f"{FIGURES[key]['VmData'] / state:.0%}",
        )
        for key, name in (("fsdp", "FSDP, 4 ranks"), ("deepspeed", "ZeRO-3, 4 ranks"))
    ]
    header = (
        "",
        "anonymous memory of the largest rank",
        "as the limit counts (VmData)",
        "of the whole state",
    )
    conditions = _report.conditions("torch", "transformers", "deepspeed")
    text = (
        f"{_report.sentence(conditions)}\n\n{FIGURES['num_parameters'] / 1e6:.0f} million parameters, "
        "AdamW in fp32: the training state "
        f"takes {gib(state)}, and each process may have half, {gib(state // 2)} (`prlimit --data`). "
        f"{NUM_STEPS} steps of 4 packs of 32 tokens, everything computed again in the backward pass, "
        "and a save.\n\n"
        f"{_report.table(header, rows)}"
    )
    if "one" in FIGURES:
        text += f"\nOne rank alone: `{FIGURES['one']['said'].split('/')[0]}...`, exit code 4.\n"
    _report.write(
        "too_large",
        "Half of the state",
        text,
        FIGURES | {"conditions": conditions, "state_bytes": state},
        "# Too large for one rank",
    )
