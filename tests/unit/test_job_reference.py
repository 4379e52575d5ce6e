"""The reference pages and the JSON schema say what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher import errors
from launcher.data.section import Data
from launcher.job import reference
from launcher.job.describe import columns_by_task, docstring, expected_of, keys
from launcher.job.load import load
from launcher.values import Interval

DOCS = Path(__file__).parents[2] / "docs" / "reference"


def test_pages_are_as_they_are_made() -> None:
    assert (DOCS / "job-file.md").read_text(encoding="utf-8") == reference.job_file_page(), "run `make docs`"
    assert (DOCS / "exit-codes.md").read_text(encoding="utf-8") == reference.exit_codes_page(), (
        "run `make docs`"
    )


def test_make_docs_writes_both(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "launcher.job.reference", str(tmp_path / "new")], check=True, timeout=600
    )
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"job-file.md", "exit-codes.md"}


@pytest.mark.parametrize("key", list(keys()), ids=lambda key: key.path)
def test_every_key_is_explained(key: object) -> None:
    assert docstring(key.section, key.name)  # type: ignore[attr-defined]
    assert expected_of(key.field)  # type: ignore[attr-defined]


def test_page_has_every_key_and_every_exit_code() -> None:
    page = reference.job_file_page()
    assert all(f"`{key.path.rsplit('.', 1)[-1]}`" in page or f"`{key.path}`" in page for key in keys())
    assert all(
        f"| {error.exit_code} | {error.__name__} |" in reference.exit_codes_page()
        for error in errors.leaves()
    )


def test_schema_describes_every_key() -> None:
    schema = reference.json_schema()
    for key in keys():
        names = (
            [one.__name__ for one in columns_by_task().values()]
            if key.section is Data
            else [key.section.__name__]
        )
        for place in [schema] if "." not in key.path else [schema["$defs"][name] for name in names]:
            assert place["properties"][key.path.rsplit(".", 1)[-1]]["description"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Checkpoint"]["properties"]["every"]["default"] == "15min"


@pytest.mark.parametrize(
    "interval",
    [
        Interval(value=900, unit="seconds"),
        Interval(value=200, unit="steps"),
        Interval(value=2, unit="epochs"),
    ],
)
def test_defaults_are_shown_as_they_may_be_written(interval: Interval, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n")
    job = tmp_path / "job.yaml"
    text = "name: a\nmodel: {name: o/m}\ndata: {train: {path: train.txt}, text: text}\n"
    job.write_text(f"{text}checkpoint: {{every: {reference.shown(interval).removesuffix(' steps')}}}\n")
    assert load(job).checkpoint.every == interval


def test_keys_and_values_are_layers_only_where_they_are_numbers_of_layers() -> None:
    told = {key.path: expected_of(key.field) for key in keys()}
    assert told["cluster.environment"] == told["cluster.sbatch"] == "keys and values"
    assert told["distillation.hidden_states.layers"].startswith(
        "layers of the model with those of the teacher"
    )
