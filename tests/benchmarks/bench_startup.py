"""How long the command line takes to answer: `launcher --help` and `launcher validate`, and that neither
imports torch.

python tests/benchmarks/bench_startup.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from _report import ROOT, conditions, sentence, table, timed, write

NUM_RUNS = 10
TARGETS = {"--help": 0.2, "validate": 0.4}
JOB = """name: startup
model: {name: model, task: causal-lm}
data: {train: {path: rows.jsonl}, text: text}
"""
PREFACE = (
    "# Start-up of the command line\n\n`tests/benchmarks/bench_startup.py`: wall seconds of whole "
    "processes, one after another.\n"
)


def main() -> None:
    """Time each command, look for torch among its imports, and write the section."""
    found = conditions("pydantic", "typer")
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        job = write_job(Path(scratch))
        for name, arguments in {"--help": ["--help"], "validate": ["validate", str(job)]}.items():
            command = [str(Path(sys.executable).with_name("launcher")), *arguments]
            seconds = sorted(timed(command, cwd=ROOT) for _ in range(NUM_RUNS))
            torch = imports_torch(arguments)
            figures[name] = {"seconds": seconds, "imports_torch": torch}
            shown = [f"{value:.3f}" for value in (seconds[0], median(seconds), seconds[-1])]
            rows.append([f"launcher {name}", *shown, TARGETS[name], "yes" if torch else "no"])
    text = (
        sentence(found)
        + "\n\n"
        + table(["", "min s", "median s", "max s", "target s", "imports torch"], rows)
    )
    print(text)
    print(write("startup", found["date"], text, {"conditions": found, **figures}, PREFACE))


def write_job(directory: Path) -> Path:
    """A job file and the files it names."""
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (directory / "rows.jsonl").write_text('{"text": "a row"}\n', encoding="utf-8")
    (directory / "job.yaml").write_text(JOB, encoding="utf-8")
    return directory / "job.yaml"


def imports_torch(arguments: list[str]) -> bool:
    """Whether the command has torch among its modules when it ends."""
    code = (
        "import sys\nfrom launcher.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(42 if 'torch' in sys.modules else 0)"
    )
    return (
        subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, cwd=ROOT, check=False
        ).returncode
        == 42
    )


if __name__ == "__main__":
    main()
