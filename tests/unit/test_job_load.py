"""Job files: what is accepted, and that every way to get one wrong is named by key, value and reason, all at
once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError, Problem
from launcher.job import paths
from launcher.job.adapter import Adapter
from launcher.job.load import load
from launcher.job.schema import Job
from launcher.training.demo import models
from launcher.training.demo.models import PACKAGES, model_directory
from launcher.values import Interval

CAUSAL: dict[str, Any] = {
    "name": "run",
    "model": {"name": "org/model"},
    "data": {"train": {"path": "train.jsonl"}, "text": "body"},
}
CLASSES: dict[str, Any] = {
    "name": "run",
    "model": {"name": "org/model", "task": "sequence-classification"},
    "data": {"train": {"path": "train.jsonl"}, "text": "body", "label": "intent"},
}
EVALUATED = ["data.evaluation={path: test.jsonl}"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train.jsonl", "test.jsonl", "part-0.csv", "part-1.csv", "notes.docx"):
        (tmp_path / name).write_text("{}\n")
    for name, content in (
        ("saved/state", "{}"),
        ("dict/dataset_dict", '{"splits": ["train", "test"]}'),
        ("broken/dataset_dict", "[]"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.json").write_text(content)
    return tmp_path


def write(folder: Path, content: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def problems(folder: Path, content: Any, *overrides: str) -> dict[str, Problem]:
    with pytest.raises(ConfigurationError) as caught:
        load(write(folder, content), list(overrides))
    assert caught.value.exit_code == 2
    found = caught.value.problems
    assert len({problem.key for problem in found}) == len(found), "one problem for each key"
    return {problem.key: problem for problem in found}


def test_defaults_and_absolute_paths(folder: Path) -> None:
    job = load(write(folder, CAUSAL))
    assert job.data.train.path == str(folder / "train.jsonl")
    assert job.batch.micro_batch_size == "auto"
    assert job.model.name == "org/model"


def test_paths_do_not_depend_on_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, CAUSAL)
    monkeypatch.chdir(folder)
    by_name = load("job.yaml")
    monkeypatch.chdir("/")
    assert by_name == load(path)


def test_pattern_of_files(folder: Path) -> None:
    assert load(write(folder, CAUSAL), ["data.train.path=part-*.csv"]).data.train.path == str(
        folder / "part-*.csv"
    )


def test_local_model_is_made_absolute(folder: Path) -> None:
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text("{}")
    assert load(write(folder, CAUSAL), ["model.name=tiny"]).model.name == str(folder / "tiny")


def test_a_model_of_a_package_is_its_directory_in_a_job_file_too(folder: Path) -> None:
    directory = str(model_directory("minilm-l6"))
    named = CAUSAL | {"model": {"name": "minilm-l6"}}
    assert load(write(folder, named)).model.name == directory
    assert load(write(folder, CAUSAL), ["model.name=minilm-l6"]).model.name == directory
    (folder / "minilm-l6").mkdir()
    (folder / "minilm-l6/config.json").write_text("{}")
    assert load(write(folder, named)).model.name == str(folder / "minilm-l6"), "a folder goes before"


def test_a_model_that_is_unpacked_says_so_while_one_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that unpacks takes 20 s; here another one speaks in its place."""
    monkeypatch.setattr(models, "_convert", lambda source, target: None)
    models._unpacked(folder / "model.gguf", folder / "models" / "small")
    assert capsys.readouterr().err.startswith(f"{paths._UNPACKING}small into {folder}")
    program = "import sys\nprint('unpacking it: 20 s\\nnoise', file=sys.stderr)\nprint('/a/b')\n"
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{program}")
    python.chmod(0o755)
    monkeypatch.setattr(paths.sys, "executable", str(python))
    paths._packaged.cache_clear()
    assert paths._packaged("smollm2-135m") == ("/a/b", "")
    paths._packaged.cache_clear()
    assert capsys.readouterr().err == "unpacking it: 20 s\n"


def test_a_model_whose_package_is_not_here_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(paths.PACKAGED) == set(PACKAGES)
    monkeypatch.setattr(paths, "PACKAGED", ("no-such-model",))
    wrong = problems(folder, CAUSAL, "model.name=no-such-model")
    assert wrong["model.name"].reason.startswith("no package is known to carry it; these are: smollm2-135m")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=1e-5", ("training", "learning_rate"), 1e-5),
        ("training.betas=[0.8, 0.9]", ("training", "betas"), (0.8, 0.9)),
        ("training.early_stopping.patience=7", ("training", "early_stopping", "patience"), 7),
        ("checkpoint.every=2 epochs", ("checkpoint", "every"), Interval(value=2, unit="epochs")),
        ("checkpoint.every=90s", ("checkpoint", "every"), Interval(value=90, unit="seconds")),
        ("checkpoint.every=200", ("checkpoint", "every"), Interval(value=200, unit="steps")),
        ("checkpoint.async=false", ("checkpoint", "asynchronous"), False),
        ("cluster.grace=2min", ("cluster", "grace"), 120.0),
        ("cluster.hang_after=5min", ("cluster", "hang_after"), 300.0),
        ("cluster.hang_after=90", ("cluster", "hang_after"), 90.0),
        ("cluster.hang_after=off", ("cluster", "hang_after"), "off"),
        ("cluster.hang_after=auto", ("cluster", "hang_after"), "auto"),
        ("name=2026-11-22", ("name",), "2026-11-22"),
        ("trackers=[]", ("trackers",), ()),
        ("data.text=null", ("data", "text"), None),
    ],
)
def test_override(folder: Path, override: str, key: tuple[str, ...], value: object) -> None:
    extra = ["data.messages=turns"] if override.startswith("data.text") else []
    found: Any = load(write(folder, CAUSAL), [*EVALUATED, override, *extra])
    for step in key:
        found = getattr(found, step)
    assert found == value


def test_later_override_wins(folder: Path) -> None:
    assert load(write(folder, CAUSAL), ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize("text", ["learning_rate", "=3", "a..b=3", "training.seed"])
def test_override_without_key_or_value(folder: Path, text: str) -> None:
    assert "KEY=VALUE" in problems(folder, CAUSAL, text)["--set"].reason


def test_override_that_is_not_yaml(folder: Path) -> None:
    assert "--set training.betas" in problems(folder, CAUSAL, "training.betas=[1, 2")


def listed(folder: Path, *overrides: str) -> Job:
    """A job with two sources and two groups of parameters."""
    content = {
        **CAUSAL,
        "data": CAUSAL["data"] | {"train": [{"path": "train.jsonl"}, {"path": "train.jsonl"}]},
    }
    groups = [{"parameters": ["*.bias"], "learning_rate": 1e-4}, {"parameters": ["*.weight"]}]
    return load(write(folder, content | {"training": {"max_steps": 2, "groups": groups}}), [*overrides])


def test_override_of_an_entry_of_a_list(folder: Path) -> None:
    job = listed(
        folder,
        "data.train.0.weight=2",
        "data.train.1.weight=3",
        "data.train.1.columns.text=body",
        "training.groups.1.learning_rate=1e-3",
        "training.groups.0.parameters.0=*.norm",
        "training.betas=[0.8, 0.9]",
        "training.betas.1=0.95",
        "model.config.id2label.0=bad",
    )
    first, second = job.data.train.sources or ()
    assert (first.weight, second.weight, second.columns) == (2, 3, {"text": "body"})
    assert [group.learning_rate for group in job.training.groups] == [1e-4, 1e-3]
    assert job.training.groups[0].parameters == ("*.norm",)
    assert job.training.betas == (0.8, 0.95)
    assert (job.model.config or {})["id2label"] == {"0": "bad"}, "a section of the user's own has any key"


def test_override_of_a_list_as_a_run_keeps_it(folder: Path) -> None:
    job = listed(folder, "data.train.0.weight=1", "data.train.1.weight=1")
    content = job.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True)
    assert "sources" in content["data"]["train"]
    again = load(write(folder, content), ["data.train.1.weight=5"])
    assert [source.weight for source in again.data.train.sources or ()] == [1, 5]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.train.2.weight=1", "data.train has no entry 2: they are data.train.0 to data.train.1"),
        ("data.train.-1.weight=1", "-1 is no number of an entry"),
        ("data.train.limit=5", "data.train is a list, and limit is no number of an entry"),
        (f"data.train.{'9' * 5000}.weight=1", "is no number of an entry"),
        ("data.evaluation.0.path=a.jsonl", "data.evaluation is not in the job file, so it has no entry 0"),
        ("model.unfreeze.0.at=5", "so it has no entry 0; write it as a list of sections of keys"),
        ("batch.0=5", "batch is not in the job file, so it has no entry 0; write it as a section"),
        ("model.0.name=5", "model holds a section of keys, so it has no entry 0"),
        ("data.train.0.path.1=a", "path is not a section: it holds str"),
    ],
)
def test_override_of_an_entry_that_is_not_there(override: str, reason: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError) as raised:
        listed(folder, override)
    assert reason in raised.value.problems[0].reason


def test_override_of_an_entry_of_an_empty_list(folder: Path) -> None:
    found = problems(folder, CAUSAL, "training.groups=[]", "training.groups.0.learning_rate=1")
    assert "an empty list" in found["--set training.groups.0.learning_rate"].reason


def test_override_below_a_value(folder: Path) -> None:
    assert "not a section" in problems(folder, CAUSAL, "name.first=x")["--set name.first"].reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("- a\n- b\n", "list"),
        ("name: a\nmodel: [1\n", "line 3"),
        ("name: a\nmodel: {}\nname: b\n", "name is written twice (lines 1 and 3)"),
        ("data:\n  text: a\n  text: b\n", "text is written twice (lines 2 and 3)"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("? [a, b]\n: 1\n", "unhashable"),
    ],
)
def test_not_a_job_file(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=r"job\.yaml") as caught:
        load(write(folder, text))
    assert said in str(caught.value)


def test_syntax_error_does_not_show_the_line(folder: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(write(folder, "api_key: sk-abcdefghijklmnop1234: [\n"))
    assert "sk-abc" not in str(caught.value)


def test_file_that_cannot_be_read(folder: Path) -> None:
    write(folder, CAUSAL)
    for path, said in (
        (folder / "jbo.yaml", "the nearest there is job.yaml"),
        (folder, "a directory"),
        (folder / "no" / "job.yaml", "not there"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load(path)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load(folder / "binary.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission(folder: Path) -> None:
    path = write(folder, CAUSAL)
    path.chmod(0)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("model.atention=sdpa", "model.atention", "model.attention"),
        ("training.lerning_rate=1", "training.lerning_rate", "training.learning_rate"),
        ("learning_rate=1", "learning_rate", "training.learning_rate"),
        ("learnin_rate=1", "learnin_rate", "training.learning_rate"),
        ("checkpoint.asynch=true", "checkpoint.asynch", "checkpoint.async"),
        ("data.train.pth=a", "data.train.pth", "data.train.path"),
        ("zzz=1", "zzz", "known here: name, model"),
    ],
)
def test_unknown_key(folder: Path, override: str, key: str, said: str) -> None:
    problem = problems(folder, CAUSAL, override)[key]
    assert "unknown key" in problem.reason and said in problem.reason


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.task=causal_lm", "the nearest is causal-lm"),
        ("training.optimizer=admw", "the nearest is adamw"),
        ("trackers=wandb", "the nearest is [wandb]"),
        ("precision=bfloat16", "one of bf16, fp16, fp32, or auto"),
        ("batch.global_batch_size=0", "at least 1"),
        ("batch.global_batch_size=1.5", "whole number"),
        ("batch.micro_batch_size=big", "whole number of at least 1 and at most 1,000,000,000, or auto"),
        ("batch.micro_batch_size=0", "whole number of at least 1 and at most 1,000,000,000, or auto"),
        ("training.betas=[0.9, 1.0]", "below 1"),
        ("training.betas=[0.9]", "a list of 2"),
        ("training.learning_rate=fast", "a number above 0"),
        ("training.epochs=0", "a number above 0"),
        ("data.packing=7", "true or false"),
        ("data.max_length=2", "at least 8"),
        ("checkpoint.every=0", "15min"),
        ("checkpoint.every=soon", "15min"),
        ("checkpoint.every=true", "15min"),
        ("cluster.grace=-1s", "15min"),
        ("cluster.hang_after=0", "write auto, off, or a time of at least 1 s"),
        ("cluster.hang_after=never", "write auto, off, or a time of at least 1 s"),
        ("cluster.hang_after=true", "write auto, off, or a time of at least 1 s"),
        ("cluster.gpus_per_node=-1", "at least 0"),
        ("trackers=[tensorbord]", "tensorboard"),
        ("tracking.project=''", "must not be empty"),
        ("tracking.project=7", "text"),
        ("tracking.group=" + "a" * 129, "at most 128"),
        ("tracking.tags=small", "a list of texts"),
        ("name=a b", "letters, digits"),
        ("name=" + "a" * 101, "at most 100"),
        ("name=3", "text"),
        ("model.name=''", "must not be empty"),
        ("model=bert", "section"),
    ],
)
def test_value(folder: Path, override: str, said: str) -> None:
    key = override.partition("=")[0]
    assert said in problems(folder, CAUSAL, *EVALUATED, override)[key].reason


def test_missing_keys_say_what_they_are(folder: Path) -> None:
    found = problems(folder, {"data": {}})
    assert {"name", "model", "data.train"} <= set(found)
    assert found["model"].reason == "is missing: Name the model and its task."


ADAPTER = "model.adapter.rank=8"
IA3 = "model.adapter={method: ia3, targets: [k_proj, down_proj]"
PROMPT = "model.adapter={method: prompt-tuning"
P_TUNING = "model.adapter={method: p-tuning"
PREFIX = "model.adapter={method: prefix-tuning"
FROZEN = "model.freeze={layers: all}"
CONTRADICTIONS = [
    (
        CAUSAL,
        ["data.text=null"],
        "data",
        "exactly one of text, prompt + completion, or messages; there is none",
    ),
    (CAUSAL, ["data.messages=turns"], "data", "text and messages"),
    (CAUSAL, ["data.text=null", "data.prompt=q"], "data.prompt", "go together"),
    (CAUSAL, ["data.text=null", "data.completion=a"], "data.completion", "go together"),
    (CAUSAL, ["data.text=[a, b]"], "data.text", "one column"),
    (
        CAUSAL,
        ["data.text=null", "data.prompt=q", "data.completion=q"],
        "data.completion",
        "is the column of data.prompt as well; name the column that has the completion",
    ),
    (CLASSES, ["data.label=body"], "data.label", "is the column of data.text as well"),
    (CLASSES, ["data.text=[a, text]", "data.label=text"], "data.label", "is the column of data.text as well"),
    (
        CAUSAL,
        ["data.label=x"],
        "data.label",
        "belongs to audio-classification, image-classification and sequence-classification, and model.task is causal-lm, which reads text, prompt",
    ),
    (
        CAUSAL,
        ["data.problem=regression"],
        "data.problem",
        "belongs to audio-classification, image-classification and sequence-classification",
    ),
    (CLASSES, ["data.text=null"], "data.text", "is missing"),
    (CLASSES, ["data.label=null"], "data.label", "is missing"),
    (CLASSES, ["data.text=[a, b, c]"], "data.text", "exactly two columns; here are 3"),
    (CLASSES, ["data.text=[]"], "data.text", "exactly two columns; here are 0"),
    (CLASSES, ["data.prompt=q"], "data.prompt", "belongs to causal-lm"),
    (CLASSES, ["data.completion=q"], "data.completion", "belongs to causal-lm"),
    (CLASSES, ["data.messages=q"], "data.messages", "belongs to causal-lm"),
    (CLASSES, ["data.tools=q"], "data.tools", "belongs to causal-lm"),
    (CLASSES, ["data.date=2026-02-28"], "data.date", "belongs to causal-lm"),
    (CAUSAL, ["data.tools=q"], "data.tools", "belongs to chats: name the column data.messages"),
    (CAUSAL, ["data.tools=[{name: x}]"], "data.tools", "belongs to chats"),
    (CAUSAL, ["data.date=2026-02-28"], "data.date", "belongs to chats"),
    (CAUSAL, ["data.date=2026-02-30"], "data.date", "a day of the calendar as YEAR-MONTH-DAY, as 2026-11-28"),
    (CAUSAL, ["data.date=20260228"], "data.date", "text"),
    (CAUSAL, ["data.date=today"], "data.date", "a day of the calendar"),
    (CAUSAL, ["data.tools=3"], "data.tools", "text, or a list of objects"),
    (CLASSES, ["data.packing=true"], "data.packing", "only language models pack"),
    (CAUSAL, ["data.train={}"], "data.train", "needs path"),
    (CAUSAL, ["data.train.name=hub/set"], "data.train.name", "leave one out"),
    (CAUSAL, ["data.train.subset=en"], "data.train.subset", "only a hub data set"),
    (
        CAUSAL,
        ["training.epochs=1", "training.max_steps=5"],
        "training.max_steps",
        "epochs and max_steps both",
    ),
    (
        CAUSAL,
        ["training.max_steps=5", "training.warmup=9"],
        "training.warmup",
        "longer than the whole training",
    ),
    (CAUSAL, ["training.warmup=1.5"], "training.warmup", "steps are whole"),
    (CAUSAL, ["training.minimum_learning_rate=1"], "training.minimum_learning_rate", "above learning_rate"),
    (
        CAUSAL,
        ["batch.global_batch_size=4", "batch.micro_batch_size=8"],
        "batch.micro_batch_size",
        "above global_batch_size (4)",
    ),
    (CAUSAL, ["training.l2_sp={alpha: 1}", "model.adapter={}"], "training.l2_sp", "leaves the weights"),
    (
        CAUSAL,
        ["training.l2_sp={alpha: 1}", "model.weights=random"],
        "training.l2_sp",
        "no place to stay near",
    ),
    (CAUSAL, ["training.l2_sp={alpha: 1e6}"], "training.l2_sp.alpha", "write 50000 or less"),
    (
        CAUSAL,
        ["training.l2_sp={alpha: 1e6, fisher: nowhere.safetensors}"],
        "training.l2_sp.fisher",
        "no such file",
    ),
    (CAUSAL, ["training.early_stopping={}"], "training.early_stopping", "name data.evaluation"),
    (CAUSAL, ["training.evaluate_every=5"], "training.evaluate_every", "name data.evaluation"),
    (CAUSAL, ["checkpoint.keep_best=1"], "checkpoint.keep_best", "name data.evaluation"),
    (
        CAUSAL,
        [*EVALUATED, "checkpoint.keep_best=1", "checkpoint.metric=acuracy"],
        "checkpoint.metric",
        "the nearest is accuracy",
    ),
    (
        CLASSES,
        [*EVALUATED, "training.early_stopping.metric=perplexity"],
        "training.early_stopping.metric",
        "loss, accuracy, f1, matthews",
    ),
    (
        CAUSAL,
        ["cluster.gpus_per_node=0", "model.attention=flash_attention_2"],
        "model.attention",
        "needs a GPU",
    ),
    (
        CAUSAL,
        ["cluster.gpus_per_node=2", "cluster.ranks_per_node=4"],
        "cluster.ranks_per_node",
        "each GPU has one rank",
    ),
    (CAUSAL, ["cluster.profile=site"], "cluster.profile", "no profile of that name"),
    (CAUSAL, ['cluster.partition="a\\nb"'], "cluster.partition", "on one line"),
    (CAUSAL, [ADAPTER, "model.freeze=['*.bias']"], "model.freeze", "leave freeze out"),
    (CAUSAL, [ADAPTER, "model.freeze={layers: all}"], "model.freeze", "leave freeze out"),
    (CAUSAL, ["model.freeze=7"], "model.freeze", "a list of patterns of parameter names, or a section"),
    (CAUSAL, ["model.freeze={layers: top}"], "model.freeze.layers", "all but last 4"),
    (
        CAUSAL,
        ["model.freeze={layer: 0-3}"],
        "model.freeze.layer",
        "the nearest known one is model.freeze.layers",
    ),
    (CAUSAL, ["model.unfreeze=[{at: 10%, from: 2}]"], "model.unfreeze", "nothing is frozen by depth"),
    (CAUSAL, [FROZEN, "model.unfreeze=[{at: 10%, from: top}]"], "model.unfreeze.0.from", "or embeddings"),
    (CAUSAL, [FROZEN, "model.unfreeze=[{at: 1.5, from: 2}]"], "model.unfreeze.0.at", "steps are whole"),
    (CAUSAL, [FROZEN, "model.unfreeze=[{from: 2}]"], "model.unfreeze.0.at", "is missing"),
    (
        CAUSAL,
        [FROZEN, "model.unfreeze=[{at: 10%, from: 2}, {at: 5, from: 1}]"],
        "model.unfreeze",
        "write all of them alike",
    ),
    (
        CAUSAL,
        [FROZEN, "model.unfreeze=[{at: 30%, from: 2}, {at: 20%, from: 1}]"],
        "model.unfreeze",
        "stand in their order in time",
    ),
    (
        CAUSAL,
        [FROZEN, "training.max_steps=40", "model.unfreeze=[{at: 50, from: 2}]"],
        "model.unfreeze",
        "never comes: the training has 40 steps",
    ),
    (CAUSAL, ["training.layer_decay=1.1"], "training.layer_decay", "at most 1"),
    (CAUSAL, ["training.groups=[{learning_rate: 1}]"], "training.groups.0.parameters", "is missing"),
    (
        CAUSAL,
        ["training.groups=[{parameters: [a], weigth_decay: 1}]"],
        "training.groups.0.weigth_decay",
        "the nearest known one is training.groups.0.weight_decay",
    ),
    (CAUSAL, ["training.restarts=2"], "training.restarts", "a key of the schedule cosine-restarts"),
    (CAUSAL, ["training.schedule=wsd"], "training.schedule", "warmup-stable-decay, one-cycle"),
    (CAUSAL, ["training.schedule=warmup-stable-decay", "training.decay=3.5"], "training.decay", "are whole"),
    (
        CAUSAL,
        ["training.schedule=one-cycle", "training.minimum_learning_rate=1e-5"],
        "training.minimum_learning_rate",
        "above the first rate, 8e-07",
    ),
    (CAUSAL, [ADAPTER, "model.weights=random"], "model.weights", "write pretrained"),
    (CAUSAL, [ADAPTER, "model.compile=true"], "model.compile", "layers with adapters are not compiled"),
    (CAUSAL, ["model.adapter.init=svd"], "model.adapter.init", "pissa"),
    (CAUSAL, ["model.adapter={init: pissa, dora: true}"], "model.adapter.init", "write one of both"),
    (CAUSAL, ["training.moments=bf16", "training.optimizer=muon"], "training.moments", "leave it out"),
    (
        CAUSAL,
        ["training.moments=8bit", "training.optimizer=sgd"],
        "training.moments",
        "is a key of adamw, adam",
    ),
    (CAUSAL, ["training.moments=int8"], "training.moments", "fp32, bf16, 8bit"),
    (
        CAUSAL,
        ["training.moments=8bit", "parallel.engine=deepspeed"],
        "training.moments",
        "write parallel.engine: fsdp, or bf16",
    ),
    (CAUSAL, ["training.betas=[0.8, 0.9]", "training.optimizer=sgd"], "training.betas", "adamw, adam, muon"),
    (CAUSAL, ["training.epsilon=1e-6", "training.optimizer=adafactor"], "training.epsilon", "is adafactor"),
    (CAUSAL, ["training.momentum=0.5"], "training.momentum", "is a key of sgd, muon"),
    (
        CAUSAL,
        ["training.optimizer=adafactor", "parallel.engine=deepspeed"],
        "training.optimizer",
        "write parallel.engine: fsdp, or adamw",
    ),
    (CAUSAL, ["model.adapter.method=lora3"], "model.adapter.method", "one of lora, ia3, prompt-tuning"),
    (
        CAUSAL,
        ["model.adapter.method=ia3"],
        "model.adapter.targets",
        "name them, of a llama as [k_proj, v_proj, down_proj]",
    ),
    (CAUSAL, [f"{IA3}, rank: 8}}"], "model.adapter.rank", "IA3 has a vector for each layer; leave it out"),
    (CAUSAL, [f"{IA3}, dropout: 0.1}}"], "model.adapter.dropout", "of low-rank matrices"),
    (CAUSAL, ["model.adapter.feedforward=[down_proj]"], "model.adapter.feedforward", "write method: ia3"),
    (CAUSAL, [f"{PROMPT}, rank: 8}}"], "model.adapter.rank", "is of a layer, and prompt tuning changes none"),
    (CAUSAL, [f"{PROMPT}, targets: [q_proj]}}"], "model.adapter.targets", "or write method: lora"),
    (CAUSAL, [f"{PROMPT}, train_also: [a]}}"], "model.adapter.train_also", "prompt tuning changes none"),
    (CAUSAL, [f"{PROMPT}, feedforward: [a]}}"], "model.adapter.feedforward", "prompt tuning changes none"),
    (CAUSAL, [f"{PROMPT}, virtual_tokens: 0}}"], "model.adapter.virtual_tokens", "at least 1"),
    (
        CAUSAL,
        [f"{PROMPT}, virtual_tokens: 64}}", "data.max_length=64"],
        "model.adapter.virtual_tokens",
        "virtual tokens count in data.max_length, which is 64; write fewer, or raise that",
    ),
    (
        CAUSAL,
        ["model.adapter.virtual_tokens=8"],
        "model.adapter.virtual_tokens",
        "write method: prompt-tuning, or leave it out",
    ),
    (CAUSAL, ["model.adapter.init_text=translate"], "model.adapter.init_text", "is of virtual tokens"),
    (CAUSAL, [f"{P_TUNING}, rank: 8}}"], "model.adapter.rank", "is of a layer, and P-tuning changes none"),
    (CAUSAL, [f"{P_TUNING}, init_text: a}}"], "model.adapter.init_text", "write method: prompt-tuning"),
    (
        CAUSAL,
        [f"{P_TUNING}, encoder_num_layers: 3}}"],
        "model.adapter.encoder_num_layers",
        "is of an LSTM, and an MLP has three layers; leave it out, or write encoder: lstm",
    ),
    (CAUSAL, [f"{PREFIX}, dropout: 0.1}}"], "model.adapter.dropout", "prefix tuning changes none"),
    (CAUSAL, [f"{PREFIX}, init_text: a}}"], "model.adapter.init_text", "are no words that a text could be"),
    (CAUSAL, [f"{PREFIX}, encoder: lstm}}"], "model.adapter.encoder", "write method: p-tuning, or leave it"),
    (
        CLASSES,
        [f"{PREFIX}}}"],
        "model.adapter.method",
        "a sequence-classification task reads no learned keys and values (causal-lm does); write prompt",
    ),
    (CAUSAL, [f"{P_TUNING}, encoder: gru}}"], "model.adapter.encoder", "write mlp or lstm"),
    (CAUSAL, [f"{PROMPT}, encoder: lstm}}"], "model.adapter.encoder", "write method: p-tuning, or leave it"),
    (
        CAUSAL,
        ["model.adapter.encoder_hidden_size=8"],
        "model.adapter.encoder_hidden_size",
        "method: p-tuning",
    ),
    (
        CAUSAL,
        [f"{PROMPT}}}", "training.neftune_noise_alpha=5"],
        "training.neftune_noise_alpha",
        "would fall on virtual tokens too; leave it out",
    ),
    (CAUSAL, [f"{PROMPT}}}", "distillation.teacher=other"], "distillation", "none of the student's virtual"),
    (
        CAUSAL,
        [f"{PROMPT}}}", "model.task=masked-lm"],
        "model.adapter.method",
        "a masked-lm task puts no virtual tokens before a sample (causal-lm, sequence-classification, "
        "sequence-to-sequence, token-classification do); write lora",
    ),
    (CAUSAL, ["model.adapter.rank=0"], "model.adapter.rank", "at least 1"),
    (CAUSAL, ["model.adapter.alpha=0"], "model.adapter.alpha", "above 0"),
    (CAUSAL, ["model.adapter.dropout=1"], "model.adapter.dropout", "below 1"),
    (CAUSAL, ["model.adapter.targets=all"], "model.adapter.targets", "all-linear"),
    (CAUSAL, ["model.adapter.targets=[]"], "model.adapter.targets", "all-linear"),
    (CAUSAL, ["parallel.engine=zero"], "parallel.engine", "fsdp or deepspeed"),
    (CAUSAL, ["parallel.shard=stage3"], "parallel.shard", "one of full, gradients, optimizer, none"),
    (CAUSAL, ["memory.offload=optimiser"], "memory.offload", "the nearest is optimizer"),
    (CAUSAL, ["data.train.path=trian.jsonl"], "data.train.path", "the nearest there is train.jsonl"),
    (CAUSAL, ["data.train.path=*.parquet"], "data.train.path", "no file fits"),
    (CAUSAL, ["data.train.path=notes.docx"], "data.train.path", "not of a kind that is read"),
    (CAUSAL, ["data.train.path=notes*"], "data.train.path", "not of a kind that is read"),
    (CAUSAL, ["data.train.path=."], "data.train.path", "a directory"),
    (CAUSAL, ["data.train.split=test"], "data.train.split", "files have no splits"),
    (CAUSAL, ["data.train={path: savd, split: test}"], "data.train.path", "the nearest there is saved"),
    (CAUSAL, ["data.train={path: dict, split: dev}"], "data.train.split", "has the splits train, test"),
    (
        CAUSAL,
        ["data.evaluation={path: dict}"],
        "data.evaluation.split",
        "name the split of dict that is held out: train, test",
    ),
    (CAUSAL, ["data.train={path: saved, split: train}"], "data.train.split", "one data set without splits"),
    (CAUSAL, ["data.train={path: broken}"], "data.train.path", "a directory that save_to_disk did not write"),
    (CAUSAL, ["data.evaluation.path=no/test.jsonl"], "data.evaluation.path", "is not there either"),
    (CAUSAL, ["model.name=./nothing"], "model.name", "no such directory"),
    (CAUSAL, ["model.name=./"], "model.name", "without a config.json"),
    (CAUSAL, ["model.name=train.jsonl"], "model.name", "a file"),
]


@pytest.mark.parametrize(
    ("content", "overrides", "key", "said"),
    CONTRADICTIONS,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_contradiction_is_the_only_problem(
    folder: Path, content: Any, overrides: list[str], key: str, said: str
) -> None:
    found = problems(folder, content, *overrides)
    assert list(found) == [key]
    assert said in found[key].reason


def test_an_adapter_has_defaults_and_may_be_a_list_of_patterns(folder: Path) -> None:
    made = load(write(folder, CAUSAL), ["model.adapter={}"]).model.adapter
    assert made == Adapter(rank=16, alpha=32.0, dropout=0.0, targets="all-linear", train_also=())
    patterns = load(
        write(folder, CAUSAL),
        ["model.adapter.targets=[q_proj, model.layers.0.*]", "model.adapter.train_also=[model.norm.*]"],
    )
    assert patterns.model.adapter == Adapter(
        targets=("q_proj", "model.layers.0.*"), train_also=("model.norm.*",)
    )
    assert load(write(folder, CAUSAL)).model.adapter is None


def test_virtual_tokens_are_on_no_layer_and_are_told_with_their_number() -> None:
    one = Adapter(method="prompt-tuning", virtual_tokens=8)
    assert one.title == "prompt tuning, 8 virtual tokens"
    assert not one.takes("model.layers.0.q_proj")
    assert one.trains("model.embed_tokens.prompt_embeddings")
    assert not one.trains("model.embed_tokens.weight")
    prefix = Adapter(method="prefix-tuning", virtual_tokens=8)
    assert prefix.title == "prefix tuning, 8 virtual tokens" and not prefix.takes("model.layers.0.q_proj")
    assert prefix.trains("model.layers.0.self_attn.prefix_key_values")
    encoded = Adapter(method="p-tuning", virtual_tokens=8, encoder="lstm")
    assert encoded.title == "P-tuning, 8 virtual tokens by LSTM"
    assert encoded.trains("model.embed_tokens.prompt_encoder.mlp_head.0.weight")
    assert not encoded.takes("model.layers.0.q_proj")


def test_what_ia3_multiplies_before_a_layer_is_one_of_its_targets() -> None:
    layers = ["model.layers.0.k_proj", "model.layers.0.down_proj"]
    one = Adapter(method="ia3", targets=("k_proj",), feedforward=("down_proj",))
    assert [problem.key for problem in one.unmatched(layers, layers)] == ["model.adapter.feedforward"]
    assert "name it in model.adapter.targets as well" in one.unmatched(layers, layers)[0].reason
    other = one.model_copy(update={"feedforward": ("up_pro",)})
    assert "matches no linear layer; the nearest are" in other.unmatched(layers, layers)[0].reason
    both = one.model_copy(update={"targets": ("k_proj", "down_proj")})
    assert not both.unmatched(layers, layers)
    assert [both.scales_input(name) for name in layers] == [False, True]


def test_everything_at_once(folder: Path) -> None:
    found = problems(
        folder,
        CAUSAL,
        "training.optimizer=admw",
        "wat=1",
        "data.train.path=none.jsonl",
        "training.early_stopping={}",
        "parallel.engine=zero",
        "data.messages=turns",
    )
    assert set(found) == {
        "training.optimizer",
        "wat",
        "data.train.path",
        "training.early_stopping",
        "parallel.engine",
        "data",
    }


def test_a_refused_key_is_not_judged_twice(folder: Path) -> None:
    found = problems(folder, CAUSAL, "training.max_steps=many", "training.epochs=1", "data.text=5")
    assert set(found) == {"training.max_steps", "data.text"}


SECRETS = [
    ("wandb_api_key", "0123456789abcdef"),
    ("model.token", "anything"),
    ("password", "hunter2"),
    ("cluster.client_secret", "s3cr3t"),
    ("model.revision", "hf_abcdefghijklmnopqrstuvwxyz"),
    ("data.text", "AKIAIOSFODNN7EXAMPLE"),
    ("env.KEY", "sk-abcdefghijklmnop1234"),
    ("data.train.name", "https://user:pass123word@host/data"),
]


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_secret_is_refused_and_never_shown(folder: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(write(folder, CAUSAL), [f"{key}={value}"])
    assert value not in str(caught.value)
    assert any(problem.key == key and "secret" in problem.reason for problem in caught.value.problems)


def test_secret_in_a_list(folder: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(write(folder, CAUSAL), ["model.freeze=[a, hf_abcdefghijklmnopqrstuvwxyz]"])
    assert "hf_abc" not in str(caught.value)
    assert any(problem.key == "model.freeze.1" for problem in caught.value.problems)


@pytest.mark.parametrize(
    "value", ["hf_model", "task-learn-classifier-base", "sk-learn-classifier-base", "org/hf_tiny"]
)
def test_ordinary_names_are_no_secrets(folder: Path, value: str) -> None:
    assert load(write(folder, CAUSAL), [f"model.name={value}"]).model.name == value


def test_job_is_frozen(folder: Path) -> None:
    job = load(write(folder, CAUSAL))
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"  # type: ignore[misc]


def test_metrics_are_those_that_are_measured() -> None:
    import numpy as np

    from launcher.data.section import Source
    from launcher.tasks import metrics
    from launcher.tasks.sequence_classification import LabelledColumns, SequenceClassification

    flat, two = np.array([0, 1, 1, 0]), np.array([[0, 1], [1, 0], [1, 1], [0, 1]])
    measured = {
        "single-label": metrics.single_label(flat, flat, 2),
        "multi-label": metrics.multi_label(two, two),
        "regression": metrics.regression(flat.astype(float), flat.astype(float)),
    }
    for kind, values in measured.items():
        task = SequenceClassification(LabelledColumns(train=Source(path="a"), problem=kind))  # type: ignore[arg-type]
        assert {"loss", *values} == set(task.metrics)


@pytest.mark.parametrize(
    "overrides",
    [["data.train.path=saved"], ["data.train.path=dict"], ["data.evaluation={path: dict, split: test}"]],
)
def test_a_directory_of_save_to_disk_is_a_source(overrides: list[str], folder: Path) -> None:
    job = load(write(folder, CAUSAL), overrides)
    assert str(folder) in str((job.data.evaluation or job.data.train).path)


def test_sections_have_no_order(folder: Path) -> None:
    turned = dict(reversed(CAUSAL.items()))
    assert load(write(folder, turned)) == load(write(folder, CAUSAL))
    assert isinstance(load(write(folder, turned)), Job)
