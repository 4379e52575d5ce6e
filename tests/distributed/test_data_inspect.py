"""`launcher data`: what it shows is what is trained, what it prepares is what a run finds, and most rows
dropped stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoConfig

from launcher import tasks
from launcher.cli import main as cli
from launcher.errors import ConfigurationError, DataError
from launcher.job.adapter import Adapter
from launcher.job.load import load
from launcher.launch import prepare_data as looking
from launcher.planner.plan import Plan
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.training.data.inspect import inspect
from launcher.training.data.spread import spread
from launcher.training.inputs import TrainingInputs
from launcher.training.signals import StopRequest
from tests.distributed.data_world import byte_tokenizer, jsonl, plan_of, word_tokenizer
from tests.training.runs import model_directory, texts
from tests.training.tiny import config_of

PAIRS = [{"q": "the cat sat", "a": f" on the mat {number}"} for number in range(6)]
BAD = [{"q": "the cat", "a": float("nan")}, {"q": "the dog"}, {"q": "", "a": "ran"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ready(
    tmp_path: Path, rows: list[Any], task: str = "causal-lm", tokenizer: Any = None, **settings: Any
) -> tuple[Plan, Any]:
    """A plan over some rows and a model that is its tokenizer and its config alone."""
    tokenizer = tokenizer or byte_tokenizer()
    config_of("llama" if task == "causal-lm" else "bert", vocab_size=len(tokenizer)).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    made = plan_of(tasks.find(task).Columns(train=jsonl(tmp_path / "a.jsonl", rows), **settings), task)
    return made.model_copy(
        update={"model": made.model.model_copy(update={"name": str(tmp_path / "model")})}
    ), tokenizer


def inspected(plan: Plan, tmp_path: Path, **request: Any) -> dict[str, Any]:
    """What is seen of one data set, without a process of its own."""
    scratch = RunDirectory(tmp_path / "scratch")
    scratch.path.mkdir(exist_ok=True)
    asked = {"roles": ["train"], "show": True, "num_rows": 3, "row": None, "tokens": False} | request
    (scratch.path / "request.json").write_text(json.dumps(asked))
    inspect(scratch, plan, 1, StopRequest())
    [found] = json.loads((scratch.path / "data.json").read_text())["datasets"]
    return found  # type: ignore[no-any-return]


def classes_inspected(labels: list[Any], problem: str, tmp_path: Path) -> dict[str, Any]:
    rows = [{"text": "the cat", "label": label} for label in labels]
    columns = {"text": "text", "label": "label", "problem": problem}
    plan, _ = ready(tmp_path, rows, "sequence-classification", word_tokenizer(), **columns)
    return inspected(plan, tmp_path)


def learned(sample: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(piece["text"], piece["learned"]) for piece in sample["pieces"]]


def test_virtual_tokens_have_no_text_and_are_not_shown(tmp_path: Path) -> None:
    plan, _ = ready(tmp_path, PAIRS, prompt="q", completion="a", max_length=64)
    adapter = Adapter(method="prompt-tuning", virtual_tokens=5)
    prompted = plan.model_copy(update={"model": plan.model.model_copy(update={"adapter": adapter})})
    plain, behind = (inspected(one, tmp_path, tokens=True)["samples"][0] for one in (plan, prompted))
    assert behind == plain and behind["pieces"][0]["text"].startswith("the cat")


def test_what_is_read_and_what_is_written_are_shown_one_behind_the_other(tmp_path: Path) -> None:
    columns = {"source": "q", "target": "a", "max_length": 32, "max_target_length": 32}
    plan, tokenizer = ready(tmp_path, PAIRS, "sequence-to-sequence", **columns)
    AutoConfig.for_model("t5", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    [sample, *_] = inspected(plan, tmp_path)["samples"]
    assert next(text for text, is_learned in learned(sample) if is_learned).strip() == "on the mat 0"
    assert learned(sample)[0] == ("the cat sat", False)
    assert sample["num_learned"] < sample["num_tokens"]


def test_what_is_shown_is_what_is_trained(tmp_path: Path) -> None:
    plan, tokenizer = ready(
        tmp_path, [BAD[0], *PAIRS], prompt="q", completion="a", max_length=64, packing=True
    )
    seen = inspected(plan, tmp_path, tokens=True, num_rows=2)
    assert [(sample["row"], sample["line"]) for sample in seen["samples"]] == [(2, 2), (3, 3)]
    dataset = TrainingInputs.of(RunDirectory(tmp_path / "scratch"), plan).train
    assert dataset.report.cached, "it was prepared as a run prepares it"
    for sample in seen["samples"]:
        found = dataset.find(sample["row"] - 1)
        assert found is not None
        ids, targets = found[1]["input_ids"], found[1]["targets"]
        assert [token["id"] for token in sample["tokens"]] == ids.tolist()
        assert [token["id"] for token in sample["tokens"] if token["learned"]] == targets[
            targets != -100
        ].tolist()
        assert "".join(piece["text"] for piece in sample["pieces"]) == tokenizer.decode(ids)
        assert (sample["num_tokens"], sample["num_learned"]) == (len(ids), int((targets != -100).sum()))
    assert learned(seen["samples"][0]) == [
        ("the cat sat", False),
        (" on the mat 0", True),
        ("<|im_end|>", True),
    ]
    assert [piece["special"] for piece in seen["samples"][0]["pieces"]] == [False, False, True]
    assert seen["dropped"] == {"missing key": 1} and seen["num_dropped"] == 1
    assert sum(count for _, _, count in seen["lengths"]["bins"]) == seen["rows_used"] == 6
    assert seen["fill"] == dataset.report.fill and seen["emptiest"] == pytest.approx(
        dataset.item_lengths.min() / 64
    )
    assert seen["samples"][0]["num_beside"] == len(dataset.find(1) and dataset.item(0)) - 1


def test_one_row_used_or_not(tmp_path: Path) -> None:
    plan, _ = ready(
        tmp_path,
        [*PAIRS, *BAD, {"q": "the cat", "a": "sat " * 99}],
        prompt="q",
        completion="a",
        max_length=32,
    )
    for number, (row, reason) in enumerate(
        zip(range(7, 10), ["missing key", "missing key", "empty"], strict=True)
    ):
        [sample] = inspected(plan, tmp_path, row=row)["samples"]
        assert (sample["row"], sample["reason"]) == (row, reason) and "pieces" not in sample, BAD[number]
    assert "'a' is NaN" in inspected(plan, tmp_path, row=7)["samples"][0]["detail"]
    [cut] = inspected(plan, tmp_path, row=10)["samples"]
    assert cut["cut"] and cut["num_tokens"] == 32
    assert inspected(plan, tmp_path, num_rows=0)["samples"] == []
    with pytest.raises(ConfigurationError, match=r"--row = 11: the train data has 10 rows"):
        inspected(plan, tmp_path, row=11)


def test_of_streamed_rows_the_first_window_is_shown(tmp_path: Path) -> None:
    streaming = {"streaming": True, "shuffle_window": 5}
    plan, _ = ready(tmp_path, [BAD[0], *PAIRS], prompt="q", completion="a", max_length=32, **streaming)
    seen = inspected(plan, tmp_path)
    assert seen["streaming"] and (seen["rows_read"], seen["rows_used"]) == (5, 4)
    assert [(sample["row"], sample["line"]) for sample in seen["samples"]] == [(2, 2), (3, 3), (4, 4)]
    assert learned(seen["samples"][0])[1] == (" on the mat 0", True)
    assert not list((tmp_path / "cache").rglob("*-windows"))
    with pytest.raises(ConfigurationError, match="streamed rows have no number among all of them"):
        inspected(plan, tmp_path, row=2)


def test_a_text_that_is_cut_within_a_character_is_shown(tmp_path: Path) -> None:
    plan, _ = ready(tmp_path, [{"t": "öäü" * 20}], text="t", max_length=9)
    [sample] = inspected(plan, tmp_path, tokens=True)["samples"]
    assert sample["pieces"][-1]["learned"] and len(sample["tokens"]) == 9


@pytest.mark.parametrize(
    ("problem", "labels", "balance", "shown"),
    [
        ("single-label", ["a", "b", "a", 1.0], {"classes": {"1": 1, "a": 2, "b": 1}}, ["a"]),
        ("multi-label", [["b"], "['a' 'b']", [], "b"], {"classes": {"a": 1, "b": 3}}, ["b"]),
    ],
)
def test_the_balance_of_labels(
    problem: str, labels: list[Any], balance: Any, shown: Any, tmp_path: Path
) -> None:
    seen = classes_inspected(labels, problem, tmp_path)
    assert seen["balance"] == balance and seen["fill"] is None
    assert seen["samples"][0]["label"] == shown
    assert learned(seen["samples"][0])[0] == ("[CLS]", False) and seen["samples"][0]["num_learned"] == 0


def test_numbers_are_spread(tmp_path: Path) -> None:
    seen = classes_inspected([number / 4 for number in range(9)], "regression", tmp_path)
    assert seen["balance"]["numbers"]["longest"] == 2.0 and seen["samples"][1]["label"] == 0.25
    assert sum(count for _, _, count in seen["balance"]["numbers"]["bins"]) == 9


@pytest.mark.parametrize("values", [[5], [1, 1, 1], [0, 1], list(range(1000)), [3, 4096], [1, 10**6]])
def test_bins_hold_every_number_once(values: list[int]) -> None:
    found = spread(np.array(values))
    bins = found["bins"]
    assert sum(count for _, _, count in bins) == len(values) and 1 <= len(bins) <= 12
    assert [high for _, high, _ in bins[:-1]] == [low for low, _, _ in bins[1:]]
    assert bins[0][0] <= min(values) and max(values) < bins[-1][1]
    assert all(count == sum(low <= value < high for value in values) for low, high, count in bins)


def test_an_evaluation_that_is_not_there(tmp_path: Path) -> None:
    plan, _ = ready(tmp_path, PAIRS, prompt="q", completion="a")
    job = type("J", (), {"data": plan.data})()
    with pytest.raises(ConfigurationError, match=r"--role = 'evaluation': the job names no data\.evaluation"):
        looking.look(job, "evaluation", 3, None, False, None)  # type: ignore[arg-type]


def test_a_job_for_a_cluster_is_looked_at_here(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", PAIRS)
    job = {
        "name": "a",
        "model": {"name": "org/model"},
        "data": {"train": {"path": "a.jsonl"}, "prompt": "q", "completion": "a"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | {"cluster": {"nodes": 2, "gpus_per_node": 8}}))
    plan = looking._here(load(tmp_path / "job.yaml", []))
    assert (plan.mesh.world_size, plan.mesh.ranks_per_node, plan.mesh.device) == (1, 1, "cpu")


def test_most_rows_dropped_are_refused_unless_it_is_written_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    plan, _ = ready(tmp_path, [*PAIRS[:2], *BAD], prompt="q", completion="a")
    reason = (
        r"train data: 3 of 5 rows \(60\.0%\) would be dropped: 2 missing key, 1 empty; the first is "
        r".*a\.jsonl, line 3: missing key \(.*NaN"
    )
    with pytest.raises(DataError, match=reason + r".*write data\.unusable: drop to use the other 2"):
        TrainingInputs.prepare(run, plan)
    assert not list(read(run.events_file)) or all(
        record["event"] != "prepared" for record in read(run.events_file)
    )
    seen = inspected(plan, tmp_path)
    assert seen["num_dropped"] == 3, "it can still be looked at"
    assert seen["refused"].startswith("a run is refused: train data: 3 of 5 rows")
    asked = plan.model_copy(update={"data": plan.data.model_copy(update={"unusable": "drop"})})
    material = TrainingInputs.prepare(run, asked)
    assert material.train.report.cached and material.train.num_samples == 2, (
        "what was refused needs not be made again"
    )
    [said] = [record for record in read(run.events_file) if record["event"] == "prepared"]
    assert (said["rows_used"], said["dropped"]) == (2, {"missing key": 2, "empty": 1})


def windows_left(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache").rglob("*-windows"), *(tmp_path / "cache").rglob("*.used")]


def test_streamed_rows_that_are_refused_are_shown(tmp_path: Path) -> None:
    rows = [*BAD[1:], BAD[1], *PAIRS[:2]]
    columns = {"prompt": "q", "completion": "a", "streaming": True}
    plan, _ = ready(tmp_path, rows, **columns, shuffle_window=3)
    seen = inspected(plan, tmp_path)
    assert [sample["line"] for sample in seen["samples"]] == [4, 5], "the first window has no sample"
    assert seen["streaming"] and seen["refused"].startswith("a run is refused: train data: 3 of 5 rows")
    with pytest.raises(ConfigurationError, match="streamed rows have no number"):
        inspected(plan, tmp_path, row=1)
    assert not windows_left(tmp_path)
    run = RunDirectory(tmp_path)
    with pytest.raises(DataError, match=r"3 of 5 rows .* would be dropped"):
        TrainingInputs.prepare(run, plan)
    plan, _ = ready(tmp_path, BAD[1:], **columns)
    (tmp_path / "scratch" / "data-train.json").unlink()
    with pytest.raises(DataError, match="none of 2 rows can be used"):
        inspected(plan, tmp_path)
    assert len(windows_left(tmp_path)) <= 2, "of the run that was refused: the next attempt removes them"


def test_to_prepare_held_out_rows_reads_none_that_are_streamed(tmp_path: Path) -> None:
    held_out = jsonl(tmp_path / "b.jsonl", PAIRS)
    columns = {"prompt": "q", "completion": "a", "streaming": True, "evaluation": held_out}
    plan, _ = ready(tmp_path, BAD[1:], **columns)  # of which none can be used
    seen = inspected(plan, tmp_path, roles=["evaluation"], show=False)
    assert (seen["role"], seen["rows_used"]) == ("evaluation", 6)
    [sample, *_] = inspected(plan, tmp_path, roles=["evaluation"])["samples"]
    assert learned(sample)[0] == ("the cat sat", False)


def test_half_is_not_most_and_too_long_rows_count(tmp_path: Path) -> None:
    long = {"q": "the cat", "a": "sat " * 99}
    plan, _ = ready(tmp_path, [PAIRS[0], long], prompt="q", completion="a", max_length=32, too_long="drop")
    TrainingInputs.prepare(RunDirectory(tmp_path), plan)
    plan, _ = ready(
        tmp_path, [PAIRS[0], long, long], prompt="q", completion="a", max_length=32, too_long="drop"
    )
    with pytest.raises(
        DataError,
        match=r"would be dropped: 2 too long; .*write a larger data\.max_length, or write data\.unusable: "
        r"drop",
    ):
        TrainingInputs.prepare(RunDirectory(tmp_path / "other"), plan)


def call(*arguments: str) -> int:
    try:
        cli.main(list(arguments))
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job of which most training rows are missing, and one row held out."""
    monkeypatch.chdir(tmp_path)
    model = model_directory(tmp_path / "model")
    good = [{"text": text} for text in texts(20)]
    jsonl(tmp_path / "train.jsonl", [*good, *[{"text": None}] * 21])
    jsonl(tmp_path / "held.jsonl", [*good[:5], {"text": " "}])
    content = {
        "name": "a",
        "model": {"name": str(model)},
        "data": {
            "train": {"path": "train.jsonl"},
            "evaluation": {"path": "held.jsonl"},
            "text": "text",
            "max_length": 64,
        },
        "batch": {"global_batch_size": 4},
        "training": {"max_steps": 1},
        "cluster": {"gpus_per_node": 0},
        "precision": "fp32",
        "trackers": [],
    }
    Path("job.yaml").write_text(yaml.safe_dump(content))
    return "job.yaml"


LINE = "train: 20 of 41 rows used, 21 dropped (21 missing key)"


@pytest.mark.very_slow
def test_what_is_prepared_is_found_by_a_run_that_says_what_it_uses(
    job: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    allowed = ("--set", "data.unusable=drop")
    assert call("data", "prepare", job, *allowed, "--json") == 0
    out, err = capfd.readouterr()
    reports = json.loads(out[out.index("{\n") :])["datasets"]
    assert [(one["role"], one["rows_used"], one["num_cut"]) for one in reports] == [
        ("train", 20, 0),
        ("evaluation", 5, 0),
    ]
    assert "attempt" not in err
    assert call("run", job, *allowed) == 0
    out, err = capfd.readouterr()
    said = err.splitlines()
    first_step = next(number for number, text in enumerate(said) if text.startswith("step 1 of 1"))
    assert any(text.startswith(LINE) for text in said[:first_step]), "before the first step"
    assert (
        f"warning: train: 21 of 41 rows (51.2%) are dropped; the first is {tmp_path / 'train.jsonl'}, "
        "line 21: missing key" in err
    )
    assert f"rows        {LINE}" in out
    prepared = [record for record in read(tmp_path / "runs/a/events.jsonl") if record["event"] == "prepared"]
    assert [(record["role"], record["cached"]) for record in prepared] == [
        ("train", True),
        ("evaluation", True),
    ]
    assert call("status", "a", "--json") == 0
    status = json.loads(capfd.readouterr().out)
    assert (
        status["data"]["train"]["dropped"] == {"missing key": 21}
        and status["data"]["evaluation"]["rows_used"] == 5
    )
    assert LINE in (tmp_path / "runs/a/attempts/0001/rank-0.log").read_text()


@pytest.mark.very_slow
@pytest.mark.slow
def test_most_rows_dropped_from_command_to_command(job: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Looked at, refused, and run once it is written that they may go."""
    assert call("data", "inspect", job, "--rows", "1") == 0
    out, err = capfd.readouterr()
    assert LINE in out and "⟦ w" in out and "first: train.jsonl, line 21: 'text' is null" in out
    assert "attempt" not in err
    assert call("data", "prepare", job) == DataError.exit_code
    _, err = capfd.readouterr()
    assert (
        err.count("error: train data: 21 of 41 rows (51.2%) would be dropped: 21 missing key") == 1
        and "rank" not in err
    )
    assert call("run", job) == ConfigurationError.exit_code, "before a rank starts"
    assert "21 of 41 rows cannot be used" in (err := capfd.readouterr().err)
    assert "with data.unusable: drop a run uses the others" in err
    assert call("run", job, "--set", "data.unusable=drop") == 0
