"""Write the run directories of tests/data/runs.

tests/training/test_earlier_runs.py reads them with the code of today. Run this in a checkout of the version
whose runs are wanted, with this file copied into it:

    python -m tests.earlier_runs OUT

It goes by the command line and by files that every version writes, so it outlives the modules of the day.
Each run is stopped half-way; `continued.json` says what an uninterrupted one gives after that. Paths in the
text files become placeholders.
"""

from __future__ import annotations

import io
import json
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
NUM_STEPS, STOP_AT = 6, 3
WORDS = [f"w{number}" for number in range(28)]
SIZES = yaml.safe_load(
    "{vocab_size: 32, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,"
    " max_position_embeddings: 64, pad_token_id: 0, bos_token_id: 1, eos_token_id: 2, initializer_range: 0.2}"
)
TEXTS = (".json", ".jsonl", ".yaml", ".txt", ".log", ".sbatch")
CLUSTER = {"gpus_per_node": 0, "ranks_per_node": 2, "threads_per_rank": 1}
SCRIPT = '''"""Fails at its first start and says so; at the second it goes on."""
import os, pathlib, sys

begun = pathlib.Path(__file__).with_name("begun")
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "was told", sys.argv[1:])
if os.environ["RANK"] == "0" and not begun.exists():
    begun.touch()
    raise RuntimeError("not at the first start")
print("went on")
'''

_CAUSAL = """
model: {name: decoder, task: causal-lm}
data: {train: {path: texts.jsonl}, evaluation: {path: texts-held-out.jsonl}, text: text, max_length: 24}
"""
_CLASSES = """
model: {name: encoder, task: sequence-classification}
data:
  {train: {path: classes.jsonl}, evaluation: {path: classes-held-out.jsonl}, text: text, label: label,
   max_length: 24}
"""
_FSDP, _ZERO_3 = "parallel: {engine: fsdp, shard: full}", "parallel: {engine: deepspeed, shard: full}"
KINDS: dict[str, dict[str, Any]] = {
    "causal-lm": yaml.safe_load(_CAUSAL + _FSDP),
    "sequence-classification": yaml.safe_load(_CLASSES + _FSDP),
    "zero3": yaml.safe_load(_CAUSAL + _ZERO_3),
    "adapter": yaml.safe_load(_CAUSAL.replace("causal-lm}", "causal-lm, adapter: {rank: 2}}") + _FSDP),
}


def main() -> None:
    """Make everything in a new folder and pack it into OUT."""
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_material(folder)
        for kind, job in KINDS.items():
            write_job(folder / f"{kind}.yaml", kind, job)
            run(folder, "run", f"{kind}.yaml", "--run-dir", "whole")
            stopped = f"run {kind}.yaml --run-dir runs/{kind} --stop-at {STOP_AT}"
            run(folder, *stopped.split(), code=75)
            said = json.dumps(continued(folder / "whole"), indent=1) + "\n"
            (folder / "runs" / kind / "continued.json").write_text(said)
            shutil.rmtree(folder / "whole")
        (folder / "script.py").write_text(SCRIPT)
        job = {"name": "script", "precision": "fp32", "cluster": CLUSTER}
        (folder / "script.yaml").write_text(yaml.safe_dump(job))
        script = "run script.yaml --script script.py --run-dir runs/script --"
        run(folder, *script.split(), "two words", code=10)
        for directory in sorted((folder / "runs").iterdir()):
            pack(out / f"{directory.name}.tar.xz", folder, [directory])
        for name in ("runs", "cache", "state"):
            shutil.rmtree(folder / name)
        pack(out / "material.tar.xz", folder, sorted(folder.iterdir()))


def write_material(folder: Path) -> None:
    """Two models of some 5,000 parameters with their tokenizer, and rows for both tasks."""
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: number for number, word in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", *WORDS])}, "[UNK]"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    for name, family, kind in (
        ("decoder", "llama", AutoModelForCausalLM),
        ("encoder", "bert", AutoModelForSequenceClassification),
    ):
        torch.manual_seed(0)
        kind.from_config(AutoConfig.for_model(family, **SIZES)).save_pretrained(folder / name)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
        )
        fast.save_pretrained(folder / name)
    generator = random.Random(0)
    for name, count in (("", 40), ("-held-out", 8)):
        texts = [" ".join(generator.choices(WORDS, k=generator.randrange(4, 20))) for _ in range(count)]
        classes = [
            {"text": text, "label": ("even", "odd")[WORDS.index(text.split()[0]) % 2]} for text in texts
        ]
        for file, rows in ((f"texts{name}", [{"text": text} for text in texts]), (f"classes{name}", classes)):
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_job(path: Path, kind: str, job: dict[str, Any]) -> None:
    """The job file of a kind: 6 steps on two ranks, saved at the end alone."""
    training = {"max_steps": NUM_STEPS, "learning_rate": 1e-2, "evaluate_every": NUM_STEPS, "seed": 5}
    common = {
        "name": kind,
        "batch": {"global_batch_size": 4},
        "training": training,
        "precision": "fp32",
        "trackers": [],
    }
    path.write_text(
        yaml.safe_dump(
            common | job | {"cluster": CLUSTER, "checkpoint": {"every": NUM_STEPS}}, sort_keys=False
        )
    )


def run(folder: Path, *arguments: str, code: int = 0) -> None:
    """A command of launcher in the folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    environment |= {"XDG_STATE_HOME": str(folder / "state")}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", *arguments], cwd=folder, env=environment
    )
    if done.returncode != code:
        raise SystemExit(f"launcher {' '.join(arguments)} ended with {done.returncode}, not {code}")


def continued(run: Path) -> dict[str, Any]:
    """What an uninterrupted run says of the steps after the stop, and the torch that it was said with."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [
        {name: record[name] for name in ("step", "loss", "grad_norm")}
        for record in records
        if record["kind"] == "train"
    ]
    measured = [record["metrics"] for record in records if record["kind"] == "evaluation"]
    return {
        "computed_by": computed_by(),
        "train": [record for record in train if record["step"] > STOP_AT],
        "evaluation": measured[-1],
    }


def computed_by() -> dict[str, str]:
    """What sums are rounded by: the same elsewhere gives the same numbers to the bit."""
    processor = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    name = processor[1] if processor else platform.machine()
    return {
        "torch": torch.__version__,
        "processor": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def pack(archive: Path, folder: Path, paths: list[Path]) -> None:
    """A compressed archive, with placeholders for what only this machine has."""
    names = {
        str(folder): "@MATERIAL@",
        str(ROOT): "@ROOT@",
        sys.executable: "@PYTHON@",
        sys.prefix: "@PREFIX@",
        socket.gethostname(): "host",
    }
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(
            path
            for each in paths
            for path in ([each] if each.is_file() else each.rglob("*"))
            if path.is_file()
        ):
            content = path.read_bytes()
            if path.suffix in TEXTS:
                for said, placeholder in names.items():
                    content = content.replace(said.encode(), placeholder.encode())
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def unpack(archive: Path, folder: Path) -> None:
    """What was packed, with this machine's names in the place of those of the other."""
    names = {
        "@MATERIAL@": str(folder),
        "@ROOT@": str(ROOT),
        "@PYTHON@": sys.executable,
        "@PREFIX@": sys.prefix,
    }
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        paths = [folder / name for name in tar.getnames()]
    for path in paths:
        if path.suffix in TEXTS:
            content = path.read_bytes()
            for placeholder, name in names.items():
                content = content.replace(placeholder.encode(), name.encode())
            path.write_bytes(content)


if __name__ == "__main__":
    main()
