"""Several sources in a job file: what is written, what is refused, and how many samples an epoch has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import tasks
from launcher.data.mixture import in_an_epoch
from launcher.data.section import MixedSource, Mixing, Sources
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.job.schema import Job
from launcher.planner.dataset.dataset_size import Items, one_pass
from launcher.planner.dataset.usable_rows import look_at_rows
from launcher.planner.search import plan_job
from launcher.tasks.mixed import data_of, measured

A = {"path": "a.jsonl"}
B = {"path": "b.jsonl"}


def job_of(folder: Path, train: Any, task: str = "causal-lm", rows: int = 8, **data: Any) -> Job:
    """A job over two files of one and two columns; `training` and `checkpoint` are sections of their own."""
    for name, count in (("a", rows), ("b", 2 * rows)):
        lines = [
            json.dumps({"text": f"row {n}", "body": "some more words", "label": str(n % 3)})
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    columns = {"text": "text"} | ({"label": "label"} if task == "sequence-classification" else {})
    sections = {name: data.pop(name) for name in ("training", "checkpoint") if name in data}
    content = {
        "name": "mixed",
        "model": {"name": "model", "task": task, "config": {"model_type": "llama"}},
        "data": {"train": train} | columns | data,
        "training": {"max_steps": 4},
        "cluster": {"gpus_per_node": 0},
    } | sections
    (folder / "job.yaml").write_text(yaml.safe_dump(content))
    return load(folder / "job.yaml")


def refused(folder: Path, train: Any, **data: Any) -> dict[str, str]:
    with pytest.raises(ConfigurationError) as raised:
        job_of(folder, train, **data)
    return {problem.key: problem.reason for problem in raised.value.problems}


def test_a_list_stands_for_the_section_with_that_list(tmp_path: Path) -> None:
    short = job_of(tmp_path, [A, B | {"columns": {"text": "body"}}])
    long = job_of(tmp_path, {"sources": [A, B | {"columns": {"text": "body"}}]})
    assert short == long
    train = short.data.train
    assert [source.path for source in train.parts] == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert train.aliases == ("a", "b")
    alike = MixedSource(path="x/a.csv"), MixedSource(path="a.tsv"), MixedSource(path="c.tsv", alias="a")
    assert Sources(sources=alike[:2]).aliases == ("a", "a-1")
    assert Sources(sources=alike).aliases == ("a-0", "a-1", "a"), "what is asked for is kept"


def test_one_source_stands_in_a_plan_as_ever(tmp_path: Path) -> None:
    plan = json.loads(plan_job(job_of(tmp_path, A)).to_json())
    assert plan["data"]["train"] == {"path": str(tmp_path / "a.jsonl"), "split": "train"}
    assert "mixing" not in plan["data"]


def test_a_plan_keeps_all_sources(tmp_path: Path) -> None:
    own = B | {"weight": 2, "columns": {"text": "body"}, "alias": "code", "limit": 5}
    plan = plan_job(job_of(tmp_path, [A | {"weight": 1}, own]))
    assert type(plan).model_validate_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["data"]["train"]["sources"][1] == {
        "path": str(tmp_path / "b.jsonl"),
        "split": "train",
        "limit": 5,
        "alias": "code",
        "weight": 2.0,
        "columns": {"text": "body"},
    }


@pytest.mark.parametrize(
    ("train", "data", "key", "reason"),
    [
        ([A, B | {"wieght": 2}], {}, "data.train.1.wieght", "nearest known one is data.train.1.weight"),
        ([A, B | {"weight": 0}], {}, "data.train.1.weight", "above 0"),
        ([A, B | {"weight": 2}], {}, "data.train.0.weight", "entry 1 has one: write a weight for every"),
        ([A, {"path": "c.jsonl"}], {}, "data.train.1.path", "no such file"),
        ([A, {}], {}, "data.train.1", "needs path"),
        ([A, B | {"name": "org/set"}], {}, "data.train.1.name", "rows come from one place"),
        ([A, B | {"alias": "not good"}], {}, "data.train.1.alias", "write letters, digits"),
        ([A | {"alias": "x"}, B | {"alias": "x"}], {}, "data.train.1.alias", "name of entry 0 too"),
        (A | {"sources": [B]}, {}, "data.train.path", "write it in an entry of the list"),
        ({"limit": 5, "sources": [A, B]}, {}, "data.train.limit", "write it in an entry of the list"),
        ([], {}, "data.train", "the list is empty"),
        ([A, 3], {}, "data.train", "an entry that is no section"),
        (3, {}, "data.train", "a source (a section of keys), or a list of sources"),
        ([A, B | {"columns": {"txt": "body"}}], {}, "data.train.1.columns.txt", "the nearest is text"),
        ([A, B | {"columns": {"packing": True}}], {}, "data.train.1.columns.packing", "same for all sources"),
        ([A, B | {"columns": {"text": {"a": 1}}}], {}, "data.train.1.columns.text", "name of a column"),
        ([A, B | {"columns": "body"}], {}, "data.train.1.columns", "write columns by the keys of data"),
        ([A, B | {"columns": {"prompt": "body"}}], {}, "data.train.1.columns.prompt", "go together"),
        ([A, B | {"columns": {"messages": "body"}}], {}, "data.train.1.columns.messages", "data.messages"),
        ([A, B | {"targets": "a.jsonl"}], {}, "data.train.1.targets", "has both columns itself"),
        (A, {"mixing": {"temperature": 2}}, "data.mixing", "write data.train as a list"),
        ([A, B], {"mixing": {"temperature": 0.5}}, "data.mixing.temperature", "at least 1"),
        ([A, B], {"mixing": {"stopping_strategy": "all"}}, "data.mixing.stopping_strategy", "all_exhausted"),
        (
            [A | {"weight": 1}, B | {"weight": 2}],
            {"mixing": {"temperature": 2}},
            "data.mixing.temperature",
            "the weights of the sources say their shares already",
        ),
        (A, {"evaluation": [A, B | {"weight": 1}]}, "data.evaluation.1.weight", "leave it out"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(
    train: Any, data: dict[str, Any], key: str, reason: str, tmp_path: Path
) -> None:
    problems = refused(tmp_path, train, **data)
    assert reason in problems[key], problems


def test_a_source_with_its_prompt_for_completion_is_refused(tmp_path: Path) -> None:
    """Also where only one of the two columns is the source's own."""
    shared = {"text": None, "prompt": "text", "completion": "body"}
    problems = refused(tmp_path, [A, B | {"columns": {"prompt": "body"}}], **shared)
    assert "is the column of data.prompt as well" in problems["data.train.1.columns.completion"]


def test_a_way_to_write_rows_leaves_out_the_others(tmp_path: Path) -> None:
    job = job_of(
        tmp_path, [A, B | {"columns": {"text": "body"}}], text=None, prompt="text", completion="body"
    )
    plain, own = (data_of("causal-lm", job.data, source) for source in job.data.train.parts)
    assert (plain.prompt, plain.completion, plain.text) == ("text", "body", None)  # type: ignore[attr-defined]
    assert (own.prompt, own.completion, own.text) == (None, None, "body")  # type: ignore[attr-defined]
    labelled = job_of(tmp_path, [A, B | {"columns": {"text": "body"}}], "sequence-classification")
    other = data_of("sequence-classification", labelled.data, labelled.data.train.parts[1])
    assert (other.text, other.label) == ("body", "label")  # type: ignore[attr-defined]


def test_a_metric_of_one_source_may_be_watched(tmp_path: Path) -> None:
    held_out = [A | {"alias": "new"}, B]
    job = job_of(tmp_path, A, evaluation=held_out, checkpoint={"keep_best": 1, "metric": "b/accuracy"})
    task = tasks.of_job(job)
    names = ["loss", "perplexity", "accuracy"]
    assert list(measured(task)) == [*names, *(f"{alias}/{name}" for alias in ("new", "b") for name in names)]
    assert measured(task)["b/accuracy"] == "higher" and measured(task)["new/loss"] == "lower"


@pytest.mark.parametrize(
    ("metric", "evaluation", "reason"),
    [
        (
            "nwe/accuracy",
            [A | {"alias": "new"}, B],
            "of new, b alone, as new/loss; the nearest is new/accuracy",
        ),
        ("b/acuracy", [A, B], "the nearest is b/accuracy"),
        ("a/loss", A, "measures loss, perplexity, accuracy; the nearest is loss"),
    ],
)
def test_a_metric_of_no_source_is_refused_with_the_nearest(
    metric: str, evaluation: Any, reason: str, tmp_path: Path
) -> None:
    sections = {"training": {"max_steps": 4, "early_stopping": {"metric": metric}}}
    sections |= {"checkpoint": {"keep_best": 1, "metric": metric}}
    problems = refused(tmp_path, A, evaluation=evaluation, **sections)
    assert reason in problems["checkpoint.metric"]
    assert reason in problems["training.early_stopping.metric"]


def test_rows_are_looked_at_by_source(tmp_path: Path) -> None:
    job = job_of(tmp_path, [A, B | {"columns": {"text": "nothing"}}])
    [problem] = look_at_rows(job).problems
    assert problem.key == "data.train.1" and "nothing" in problem.reason


@pytest.mark.parametrize(("weights", "total"), [((None, None), 24), ((1.0, 1.0), 16), ((1.0, 3.0), 21)])
def test_the_forecast_counts_by_source(weights: tuple[float | None, ...], total: int, tmp_path: Path) -> None:
    train = [one | ({"weight": w} if w else {}) for one, w in zip((A, B), weights, strict=True)]
    job = job_of(tmp_path, train)
    items = one_pass(job.data.train, job.data, "model", "causal-lm")
    assert isinstance(items, Items) and items.num_items == total
    assert [(alias, rows) for alias, _, rows in items.by_source] == [("a", 8), ("b", 16)]
    assert sum(number for _, number, _ in items.by_source) == total
    assert "from 2 sources: a " in items.words()


def sources(weights: list[float] | None, number: int) -> Sources:
    given = weights or [None] * number
    return Sources(sources=tuple(MixedSource(path=f"{k}.jsonl", weight=one) for k, one in enumerate(given)))


SIZES = st.lists(st.integers(1, 10_000), min_size=2, max_size=6)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.data())
def test_shares_are_as_the_weights_say(sizes: list[int], draws: st.DataObject) -> None:
    number = len(sizes)
    weights = draws.draw(st.lists(st.floats(0.01, 100), min_size=number, max_size=number))
    first = in_an_epoch(sizes, sources(weights, number), None)
    every = in_an_epoch(sizes, sources(weights, number), Mixing(stopping_strategy="all_exhausted"))
    for counts in (first, every):
        total = sum(counts)
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - total * weight / sum(weights)) <= number
    assert all(count <= size for count, size in zip(first, sizes, strict=True)), "no row comes twice"
    assert all(count >= size for count, size in zip(every, sizes, strict=True)), "every row comes"
    # One of them is through, but for rounding.
    assert any(count == size or count + 1 > size - number for count, size in zip(first, sizes, strict=True))


@given(SIZES)
def test_without_weights_every_row_comes_once(sizes: list[int]) -> None:
    assert in_an_epoch(sizes, sources(None, len(sizes)), None) == sizes
    assert in_an_epoch(sizes, sources(None, len(sizes)), Mixing(stopping_strategy="all_exhausted")) == sizes


def test_a_temperature_draws_shares_together_as_mt5_has_it() -> None:
    sizes = [1_000, 100_000]
    for temperature in (1.0, 2.0, 1 / 0.3, 1e6):
        mixing = Mixing(temperature=temperature, stopping_strategy="all_exhausted")
        counts = in_an_epoch(sizes, sources(None, 2), mixing)
        rates = [size ** (1 / temperature) for size in sizes]
        assert counts[0] / sum(counts) == pytest.approx(rates[0] / sum(rates), rel=1e-3)
    assert in_an_epoch(sizes, sources(None, 2), Mixing(temperature=1e6)) == [1_000, 1_000]
