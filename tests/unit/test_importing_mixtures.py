"""Several data sets of other tools as a list of sources: what is said of each, and what cannot be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError
from launcher.importing.job import Imported, import_files
from launcher.job.load import load

FACTORY = {
    "model_name_or_path": "org/small", "finetuning_type": "full", "template": "qwen", "dataset": "a, org/b",
}  # fmt: skip
AXOLOTL = {"base_model": "org/small", "sequence_len": 512, "micro_batch_size": 1}
HANDBOOK = {"model_name_or_path": "org/small", "assistant_only_loss": True}


def imported(folder: Path, content: dict[str, Any]) -> Imported:
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return import_files([path])


def told(made: Imported, kind: str) -> dict[str, str]:
    """The keys under one heading -> what is said of them."""
    return {remark.said: remark.text for remark in made.remarks if remark.kind == kind}


def test_axolotl_puts_data_sets_together(tmp_path: Path) -> None:
    rows = tmp_path / "c.jsonl"
    rows.write_text(json.dumps({"chat": [{"role": "user", "content": "a"}], "body": "b"}) + "\n")
    data_sets = [
        {"path": str(rows), "type": "completion", "field": "body", "split": "train[:9]"},
        {"path": str(rows), "type": "chat_template", "field_messages": "chat"},
        {"path": "org/d", "name": ["en", "de"], "type": "chat_template", "split": "part"},
        {"path": "json", "data_files": ["e.jsonl", "f.jsonl"], "type": "completion"},
    ]
    held_out = [{"path": "org/d", "type": "chat_template", "field_messages": "chat"}]
    made = imported(tmp_path, AXOLOTL | {"datasets": data_sets, "test_datasets": held_out})
    assert made.content["data"]["train"] == [
        {"path": str(rows), "limit": 9, "columns": {"text": "body"}},
        {"path": str(rows)},
        {"name": "org/d", "subset": "en", "split": "part", "columns": {"messages": "messages"}},
        {"name": "org/d", "subset": "de", "split": "part", "columns": {"messages": "messages"}},
        {"path": "e.jsonl", "columns": {"text": "text"}},
        {"path": "f.jsonl", "columns": {"text": "text"}},
    ]
    assert made.content["data"]["messages"] == "chat", "chats have one date, which data keeps"
    assert made.content["data"]["evaluation"] == {"name": "org/d", "split": "test"}
    assert "mixing" not in made.content["data"], "every row comes once"
    assert not {key for key in told(made, "cannot be said") if key.startswith("datasets")}


def test_a_list_that_is_imported_is_a_job(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a row", "body": "another"}\n')
    data_sets = [
        {"path": "./a.jsonl", "type": "completion"},
        {"path": "./b.jsonl", "type": "completion", "field": "body"},
    ]
    made = imported(tmp_path, AXOLOTL | {"datasets": data_sets})
    (tmp_path / "job.yaml").write_text(made.text)
    job = load(tmp_path / "job.yaml", ["model.config={model_type: llama}"])
    assert job.data.train.aliases == ("a", "b")
    assert job.data.train.parts[1].columns == {"text": "body"}  # type: ignore[attr-defined]


def test_what_axolotl_takes_of_a_data_set_is_named(tmp_path: Path) -> None:
    data_sets = [
        {"path": "a.jsonl", "type": "completion", "shards": 4},
        {"path": "b.jsonl", "type": "completion", "split": "train[10%:20%]", "preprocess_shards": 4},
        {"path": "org/c", "type": "completion", "data_files": "part/d.jsonl.zst"},
        {"path": "org/e", "type": "completion", "data_files": {"train": "d.jsonl"}},
        {"path": "json", "type": "completion", "data_files": ["d.jsonl", "e.jsonl"], "split": "train[:9]"},
        {"type": "completion"},
    ]
    made = imported(tmp_path, AXOLOTL | {"datasets": data_sets})
    cannot = told(made, "cannot be said")
    assert "drawn at random" in cannot["datasets.0.shards"]
    assert "by its limit" in cannot["datasets.1.split"] and "datasets.4.split" in cannot
    assert "names no rows" in cannot["datasets.5"]
    assert "as sources" in cannot["datasets.3.data_files"]
    assert not {"datasets.1.preprocess_shards"} & cannot.keys(), "all its rows are learned"
    assert "org/c on the hub" in told(made, "fill in")["datasets.2.data_files"]
    assert made.content["data"]["train"][2] == {"path": "part/d.jsonl.zst"}


def test_llama_factory_puts_data_sets_together(tmp_path: Path) -> None:
    made = imported(tmp_path, FACTORY | {"max_samples": 50, "eval_dataset": "c"})
    assert made.content["data"]["train"] == [
        {"path": "FILL-IN-a.jsonl", "alias": "a", "limit": 50},
        {"path": "FILL-IN-org-b.jsonl", "alias": "org-b", "limit": 50},
    ]
    assert made.content["data"]["evaluation"]["limit"] == 50, "of each data set, held out or not"
    assert "path: FILL-IN-a.jsonl   # fill in\n" in made.text
    assert {"dataset", "eval_dataset"} <= told(made, "fill in").keys()
    assert told(made, "cannot be said").keys() == {"template", "cutoff_len"}


INFO: dict[str, Any] = {
    "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "body"}, "split": "train[:9]"},
    "more": {"hf_hub_url": "org/more", "ms_hub_url": "x/more", "subset": "en", "split": "part",
             "columns": {"prompt": "text", "response": "answer"}, "num_samples": 7},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "turns", "tools": "tools"},
              "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                       "assistant_tag": "assistant", "system_tag": "system"}},
    "instructions": {"file_name": "alpaca.json"},
    "talks": {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"system": "prefix"}},
    "code": {"script_url": "code"},
}  # fmt: skip


def test_dataset_info_says_files_and_columns(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(INFO))
    content = FACTORY | {"stage": "pt", "dataset": "texts,more", "max_samples": 5, "dataset_dir": "sets"}
    made = imported(tmp_path, content)
    assert made.content["data"]["train"] == [
        {"path": "sets/texts.jsonl", "limit": 5, "alias": "texts"},
        {"name": "org/more", "subset": "en", "split": "part", "alias": "more", "limit": 5,
         "columns": {"text": "text"}},
    ]  # fmt: skip
    assert made.content["data"]["text"] == "body"
    assert "drawn at random" in told(made, "cannot be said")["dataset_info.json: more.num_samples"]
    assert "dataset" not in told(made, "fill in")

    made = imported(tmp_path, FACTORY | {"dataset": "instructions, chats, code", "dataset_dir": "sets"})
    assert made.content["data"]["messages"] == "turns" and made.content["data"]["tools"] == "tools"
    assert [one["path"] for one in made.content["data"]["train"]] == [
        "sets/alpaca.json", "sets/chats.json", "FILL-IN-code.jsonl",
    ]  # fmt: skip
    assert "data.messages" in told(made, "cannot be said")["dataset_info.json: instructions.formatting"]
    assert (
        next(one.value for one in made.remarks if one.kind == "fill in" and one.said == "dataset") == "code"
    )

    made = imported(tmp_path, FACTORY | {"stage": "pt", "dataset": "texts", "dataset_dir": "sets"})
    assert made.content["data"]["train"] == {"path": "sets/texts.jsonl", "limit": 9}

    made = imported(tmp_path, FACTORY | {"dataset": "talks", "dataset_dir": "sets"})
    assert made.content["data"]["train"] == {"path": "sets/talks.json"}
    assert "dataset_info.json: talks.formatting" in told(made, "cannot be said")


INTERLEAVED: list[tuple[dict[str, Any], list[float] | None, str | None, dict[str, str]]] = [
    ({"mix_strategy": "interleave_under"}, [1, 1], None, {"mix_strategy": "cannot be said"}),
    ({"mix_strategy": "interleave_over"}, [1, 1], "all_exhausted", {"mix_strategy": "changes meaning"}),
    ({"mix_strategy": "interleave_once"}, None, None, {"mix_strategy": "ignored"}),
    ({"mix_strategy": "interleave_once", "interleave_probs": "0.5,0.5"}, None, None,
     {"mix_strategy, interleave_probs": "ignored"}),
    ({"mix_strategy": "interleave_under", "interleave_probs": "0.75, 0.25"}, [0.75, 0.25], None,
     {"interleave_probs": "changes meaning"}),
    ({"mix_strategy": "interleave_over", "interleave_probs": "0.75,0.25", "neat_packing": True}, [0.75, 0.25],
     "all_exhausted", {"mix_strategy, packing": "cannot be said"}),
    ({"mix_strategy": "interleave_over", "eval_dataset": "c,d"}, [1, 1], "all_exhausted",
     {"eval_dataset": "cannot be said"}),
]  # fmt: skip


@pytest.mark.parametrize(("more", "weights", "stopping", "remarks"), INTERLEAVED)
def test_llama_factory_draws_from_data_sets(
    more: dict[str, Any],
    weights: list[float] | None,
    stopping: str | None,
    remarks: dict[str, str],
    tmp_path: Path,
) -> None:
    made = imported(tmp_path, FACTORY | {"dataset_dir": "ONLINE"} | more)
    data = made.content["data"]
    assert [one["name"] for one in data["train"]] == ["a", "org/b"]
    assert [one["weight"] for one in data["train"] if "weight" in one] == (weights or [])
    assert data.get("mixing", {}).get("stopping_strategy") == stopping
    for key, kind in remarks.items():
        assert key in told(made, kind)
    assert "fill in" not in {remark.kind for remark in made.remarks if remark.said == "dataset"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"mix_strategy": "interleave_uner"}, "the nearest is interleave_under"),
        ({"interleave_probs": "0.5,0.5"}, "it is concat; leave it out"),
        ({"mix_strategy": "interleave_over", "interleave_probs": "0.5"}, "write 2 numbers from 0 to 1"),
        ({"mix_strategy": "interleave_over", "interleave_probs": "half,half"}, "write 2 numbers from 0 to 1"),
    ],
)
def test_what_llama_factory_refuses_is_refused(more: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        imported(tmp_path, FACTORY | more)
    assert reason in str(caught.value)


def test_a_data_set_of_no_chance_is_no_source(tmp_path: Path) -> None:
    more = {"mix_strategy": "interleave_over", "interleave_probs": "1,0"}
    made = imported(tmp_path, FACTORY | more | {"dataset_dir": "ONLINE"})
    assert made.content["data"]["train"] == {"name": "a"} and "mixing" not in made.content["data"]
    assert "never drawn, so no source: org/b" in told(made, "ignored")["interleave_probs"]
    made = imported(tmp_path, FACTORY | more | {"dataset": "a,b,c", "interleave_probs": "0.5,0,0.5"})
    assert [one["weight"] for one in made.content["data"]["train"]] == [0.5, 0.5]


def test_trl_puts_data_sets_together(tmp_path: Path) -> None:
    data_sets = [
        {"path": "org/a", "name": "en", "split": "train", "columns": ["messages"]},
        {"path": "json", "data_files": "b.jsonl", "split": "train"},
        {"path": "org/c", "data_dir": "part"},
    ]
    made = imported(
        tmp_path, HANDBOOK | {"datasets": data_sets, "dataset_name": "org/other", "use_peft": False}
    )
    assert made.content["data"]["train"] == [
        {"name": "org/a", "subset": "en", "split": "train"},
        {"path": "b.jsonl"},
        {"name": "org/c"},
    ], "where datasets stands, dataset_name is not read"
    assert "datasets.data_dir" in told(made, "cannot be said")


def test_a_share_of_a_data_set_is_a_limit_and_no_weight(tmp_path: Path) -> None:
    mixer = {"org/a": 0.5, "org/b": 1.0, "org/c": 0}
    beside = {"dataset_splits": ["train_sft", "test_sft"], "dataset_configs": ["x", "default", "z"]}
    made = imported(tmp_path, HANDBOOK | {"dataset_mixer": mixer} | beside)
    assert made.content["data"]["train"] == [
        {"name": "org/a", "subset": "x", "split": "train_sft"},
        {"name": "org/b", "split": "train_sft"},
    ]
    assert made.content["data"]["evaluation"] == [
        {"name": "org/a", "subset": "x", "split": "test_sft"},
        {"name": "org/b", "split": "test_sft"},
        {"name": "org/c", "subset": "z", "split": "test_sft"},
    ], "all held-out rows are measured there"
    text = told(made, "cannot be said")["dataset_mixer.weight"]
    assert "the first int(0.5 x its rows)" in text and "data.train.0.limit" in text
    assert "dataset_mixer.weight" in told(made, "ignored"), "a share of 0"
    listed = [{"id": "org/a", "weight": 1.0}, {"id": "org/b", "weight": 0.25, "columns": ["messages"]}]
    made = imported(tmp_path, HANDBOOK | {"dataset_mixture": {"datasets": listed, "test_split_size": 9}})
    assert made.content["data"]["train"] == [{"name": "org/a"}, {"name": "org/b"}]
    text = told(made, "cannot be said")["dataset_mixture.weight"]
    assert "drawn at random once" in text and "data.train.1.limit" in text
    assert "dataset_mixture.test_split_size" in told(made, "cannot be said")


def test_several_splits_go_with_shares_as_the_handbook_has_it(tmp_path: Path) -> None:
    """alignment-handbook zips what it loaded with the shares, so that the second data set is left out."""
    beside = {"dataset_splits": ["train_a", "train_b"]}
    made = imported(tmp_path, HANDBOOK | {"dataset_mixer": {"org/a": 1.0, "org/b": 1.0}} | beside)
    assert made.content["data"]["train"] == [
        {"name": "org/a", "split": "train_a"},
        {"name": "org/a", "split": "train_b"},
    ]


def test_a_list_wins_over_what_another_file_says_of_one_source(tmp_path: Path) -> None:
    other = tmp_path / "b.json"
    other.write_text('{"output_dir": "o", "max_train_samples": 7}')
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(FACTORY))
    made = import_files([other, path])
    assert isinstance(made.content["data"]["train"], list)
    assert "in their entries" in told(made, "conflict")["max_train_samples"]


def test_data_sets_without_names_are_named(tmp_path: Path) -> None:
    made = imported(
        tmp_path, HANDBOOK | {"datasets": [{"id": "org/a"}, {"split": "train"}], "use_peft": False}
    )
    assert "write data.train yourself" in told(made, "cannot be said")["datasets"]
