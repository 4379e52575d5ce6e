"""Several tasks at once in a job file: what is written, what is refused, and what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.job.schema import Job
from launcher.planner.dataset.usable_rows import look_at_rows
from launcher.planner.model.model_support import support, support_of_tasks, unknown, untried
from launcher.planner.search import plan_job
from launcher.tasks.mixed import data_of, measured, of_one_task
from launcher.tasks.multi_task_columns import why_alone
from tests.unit.test_planning_decide import CPU

SCORE: dict[str, Any] = {
    "task": "sequence-classification",
    "text": ["a", "b"],
    "label": "score",
    "problem": "regression",
}
KIND: dict[str, Any] = {"task": "sequence-classification", "text": "a", "label": "kind", "loss_weight": 2}
TAGS: dict[str, Any] = {"task": "token-classification", "words": "words", "tags": "tags", "scheme": "none"}


def rows() -> str:
    each = [
        {
            "a": f"some text {n}",
            "b": f"other text {n}",
            "score": n / 3,
            "kind": str(n % 3),
            "words": ["some", "text"],
            "tags": ["X", "Y"],
        }
        for n in range(12)
    ]
    return "".join(json.dumps(row) + "\n" for row in each)


def job_of(folder: Path, entries: dict[str, Any], kind: str = "bert", **data: Any) -> Job:
    """Return a job whose tasks all read one file; `train` and `evaluation` may be given."""
    (folder / "rows.jsonl").write_text(rows())
    sources = [{"path": "rows.jsonl", "task": name} for name in entries]
    content = {
        "name": "several",
        "model": {"name": "model", "task": "multi-task", "config": {"model_type": kind}},
        "data": {"train": sources, "evaluation": sources, "tasks": entries} | data,
        "training": {"max_steps": 4},
        "cluster": {"gpus_per_node": 0},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load(folder / "job.yaml")


def refused(folder: Path, entries: dict[str, Any], **data: Any) -> dict[str, str]:
    with pytest.raises(ConfigurationError) as raised:
        job_of(folder, entries, **data)
    return {problem.key: problem.reason for problem in raised.value.problems}


def test_each_task_has_its_own_columns_and_metrics(tmp_path: Path) -> None:
    job = job_of(tmp_path, {"score": SCORE, "kind": KIND, "words": TAGS})
    task = tasks.of_job(job)
    assert list(task.parts) == ["score", "kind", "words"]
    assert {type(part).name for part in task.parts.values()} == {SCORE["task"], TAGS["task"]}
    assert task.columns == ("a", "b", "score", "kind", "words", "tags")
    assert job.data.train.aliases == ("score", "kind", "words")
    known = measured(task)
    assert next(iter(known)) == "loss"
    assert {"score/pearson", "kind/accuracy", "words/f1_macro"} <= known.keys()
    first, last = job.data.train.parts[0], job.data.train.parts[2]
    assert of_one_task("multi-task", job.data, last)[0] == "token-classification"
    own = data_of("multi-task", job.data, first)
    assert (own.text, own.problem, own.max_length) == (("a", "b"), "regression", 1024)  # type: ignore[attr-defined]
    assert look_at_rows(job).problems == ()
    plan = plan_job(job, hardware=CPU)
    assert (plan.task, plan.layout, plan.attention) == ("multi-task", "padded", "sdpa")
    assert plan.model_validate_json(plan.to_json()) == plan


def test_several_sources_of_a_task_are_measured_apart_too(tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text(rows())
    sources = [
        {"path": "rows.jsonl", "task": "score"},
        {"path": "rows.jsonl", "task": "kind"},
        {"path": "more.jsonl", "task": "kind", "columns": {"text": "b"}},
    ]
    job = job_of(tmp_path, {"score": SCORE, "kind": KIND}, train=sources, evaluation=sources)
    assert job.data.train.aliases == ("score", "kind-rows", "kind-more")
    assert {"kind/accuracy", "kind-rows/accuracy", "kind-more/accuracy"} <= measured(tasks.of_job(job)).keys()
    assert data_of("multi-task", job.data, job.data.train.parts[2]).text == "b"  # type: ignore[attr-defined]
    wrong = [*sources[:2], sources[2] | {"columns": {"words": "b"}}]
    assert (
        "may have columns of its own for text, label"
        in (refused(tmp_path, {"score": SCORE, "kind": KIND}, train=wrong)["data.train.2.columns.words"])
    )


def test_what_cannot_be_is_refused_in_one_line_each(tmp_path: Path) -> None:
    both = {"score": SCORE, "kind": KIND}

    def reason(entry: dict[str, Any], key: str) -> str:
        return refused(tmp_path, {"score": SCORE, "kind": entry})[f"data.tasks.kind.{key}"]

    assert reason({"task": "causal-lm", "text": "a"}, "task").startswith("learns words of the vocabulary")
    assert "go together are question-answering, sequence-" in reason({"task": "masked-lm"}, "task")
    assert reason({"task": "image-classification"}, "task").startswith("has rows that name files")
    assert "writes a text with a decoder" in reason({"task": "sequence-to-sequence"}, "task")
    assert "is several tasks itself" in reason({"task": "multi-task"}, "task")
    assert "the nearest is token-classification" in reason({"task": "token-clasification"}, "task")
    assert reason({"text": "a"}, "task").startswith("is missing; tasks that go together are")
    for weight in (0, -1, "much", True):
        assert "a number above 0" in reason(KIND | {"loss_weight": weight}, "loss_weight")
    assert "write it as data.max_length" in reason(KIND | {"max_length": 64}, "max_length")
    assert "write an entry there with task: kind" in reason(KIND | {"train": "x"}, "train")
    assert "the nearest is label" in reason(KIND | {"lable": "x"}, "lable")
    assert "sequence-classification learns a label" in reason(KIND | {"label": None}, "label")
    assert "Input should be" in reason(KIND | {"problem": "none"}, "problem")
    assert "names a head" in refused(tmp_path, {"a b": KIND, "score": SCORE})["data.tasks.a b"]
    sources = [{"path": "rows.jsonl", "task": "score"}, {"path": "rows.jsonl"}]
    assert (
        "whose rows these are, score or kind" in refused(tmp_path, both, train=sources)["data.train.1.task"]
    )
    sources[1]["task"] = "kinds"
    wrong = refused(tmp_path, both, train=sources)
    assert wrong["data.train.1.task"] == "data.tasks has no such task; the nearest is kind"
    assert wrong["data.train"].startswith("has no rows of the task kind")
    alone = {"path": "rows.jsonl"}
    assert "write a list, each entry with its task" in refused(tmp_path, both, train=alone)["data.train"]
    held_out = [{"path": "rows.jsonl", "task": "kind"}]
    assert "no rows of the task score" in refused(tmp_path, both, evaluation=held_out)["data.evaluation"]
    assert "is empty" in refused(tmp_path, {}, train=[alone], evaluation=None)["data.tasks"]


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    job_of(tmp_path, {"score": SCORE, "kind": KIND})
    text = (tmp_path / "job.yaml").read_text().replace("    score:\n", "    kind:\n")
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"kind is written twice \(lines \d+ and \d+\)"):
        load(tmp_path / "job.yaml")


def test_the_task_of_a_source_belongs_to_several_tasks(tmp_path: Path) -> None:
    job_of(tmp_path, {"score": SCORE, "kind": KIND})
    content = yaml.safe_load((tmp_path / "job.yaml").read_text())
    content["model"]["task"] = "sequence-classification"
    del content["data"]["tasks"]
    content["data"] |= {"text": "a", "label": "kind"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigurationError, match=r"data.train.0.task.*write model.task: multi-task"):
        load(tmp_path / "job.yaml")


def test_every_task_of_a_tokenizer_and_an_encoder_goes_with_others() -> None:
    together = [name for name in tasks.TASKS if why_alone(tasks.find(name)) is None]
    assert together == ["question-answering", "sequence-classification", "token-classification"]


def test_a_model_has_the_ways_that_its_tasks_have_in_common(tmp_path: Path) -> None:
    names = ["sequence-classification", "token-classification"]
    bert = {"model_type": "bert"}
    shared = support_of_tasks(names, bert)
    assert shared.ways == tuple(
        way for way in support(names[0], bert).ways if way in support(names[1], bert).ways
    )
    assert "cannot do token-classification" in support_of_tasks(names, {"model_type": "bart"}).refused
    assert support_of_tasks(names, {"model_type": "of_next_year"}) is untried("multi-task")
    assert support_of_tasks(names, None) is unknown("multi-task")
    with pytest.raises(ConfigurationError, match="a bart model cannot do token-classification"):
        plan_job(job_of(tmp_path, {"kind": KIND, "words": TAGS}, "bart"), hardware=CPU)


@pytest.mark.parametrize("weight", [None, [2], "2", 0, -1, True])
def test_a_weight_that_is_none_is_refused_by_its_key(weight: Any, tmp_path: Path) -> None:
    found = refused(tmp_path, {"kind": KIND | {"loss_weight": weight}, "words": TAGS})
    assert "a number above 0" in found["data.tasks.kind.loss_weight"]


def test_a_source_may_not_go_by_another_tasks_name(tmp_path: Path) -> None:
    """Its metrics would stand in the place of that task's."""
    given = [{"path": "rows.jsonl", "task": name} for name in ("kind", "words")]
    entries = {"kind": KIND, "words": TAGS}
    job_of(tmp_path, entries, evaluation=[given[0] | {"alias": "kind"}, given[1] | {"alias": "held"}])
    for alias, evaluation in (
        ("words", [given[0] | {"alias": "words"}, given[1]]),
        ("kind", [given[0] | {"alias": "kind"}, given[0] | {"alias": "more"}, given[1]]),
    ):
        key = "data.evaluation.0.alias"
        reason = f"metrics of the task {alias} go by that name, and are not this source's: write another"
        assert refused(tmp_path, entries, evaluation=evaluation)[key] == reason


def test_rows_of_several_tasks_are_not_streamed(tmp_path: Path) -> None:
    found = refused(tmp_path, {"kind": KIND, "words": TAGS}, streaming=True)
    assert "multi-task" not in found["data.streaming"].partition("write false. ")[2]


def test_a_mistyped_key_is_not_told_as_another_task(tmp_path: Path) -> None:
    assert set(refused(tmp_path, {"kind": KIND | {"lable": "x"}})) == {"data.tasks.kind.lable"}
