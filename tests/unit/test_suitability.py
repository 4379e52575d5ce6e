"""What a model's files say against its rows, before anything is loaded: lengths, tokens, an adapter's
directory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.adapter import Adapter
from launcher.job.load import load
from launcher.job.schema import Model
from launcher.planner.dataset import suitability
from launcher.planner.model import positions
from launcher.planner.model.model_config import config_of
from launcher.planner.model.model_support import why_no_prompt
from launcher.planner.model.vocabulary import read_vocabulary
from launcher.planner.search import plan_job as plan

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 6, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
WORDS = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5}


def model(folder: Path, config: dict[str, Any] = LLAMA, added: tuple[str, ...] = (), **settings: Any) -> Path:
    """A directory with a config and a tokenizer of six words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = [{"id": len(WORDS) + index, "content": name} for index, name in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": WORDS}}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def job(folder: Path, name: Path | str, max_length: int = 32, **more: Any) -> Path:
    (folder / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n')
    content = {
        "name": "a",
        "model": {"name": str(name)} | more,
        "data": {"train": {"path": "rows.jsonl"}, "text": "text", "max_length": max_length},
        "cluster": {"gpus_per_node": 0},
        "precision": "fp32",
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(*arguments: str) -> int:
    """The exit code of a command."""
    try:
        main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0)
    return 0


TABLES = [
    ({"model_type": "bert", "max_position_embeddings": 512}, 512),
    ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),
    ({"model_type": "camembert", "max_position_embeddings": 514, "pad_token_id": 0}, 513),
    ({"model_type": "gpt2", "n_positions": 1024}, 1024),
    ({"model_type": "opt", "max_position_embeddings": 2048}, 2048),
    ({"model_type": "mpt", "max_seq_len": 2048}, 2048),
    ({"model_type": "deberta-v2", "max_position_embeddings": 512}, 512),
    ({"model_type": "deberta-v2", "max_position_embeddings": 512, "position_biased_input": False}, None),
    ({"model_type": "esm", "max_position_embeddings": 1026, "position_embedding_type": "rotary"}, None),
    ({"model_type": "llama", "max_position_embeddings": 4096}, None),
    ({"model_type": "bert"}, None),
    ({"model_type": "t5"}, None),
]


@pytest.mark.parametrize(("config", "number"), TABLES)
def test_positions_of_a_table(config: dict[str, Any], number: int | None) -> None:
    held = positions.held(config)
    assert (held and held[0]) == number


@pytest.mark.parametrize(
    ("config", "number"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_parameters": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}, 4096),
        ({"text_config": {"model_type": "gemma3_text", "max_position_embeddings": 8192}}, 8192),
        ({}, None),
    ],
)
def test_positions_that_a_rotary_model_was_made_for(config: dict[str, Any], number: int | None) -> None:
    made_for = positions.trained({"model_type": "llama"} | config)
    assert (made_for and made_for[0]) == number


def test_longer_than_the_positions_is_refused_before_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = model(
        tmp_path / "bert",
        LLAMA | {"model_type": "roberta", "max_position_embeddings": 130, "type_vocab_size": 1},
    )
    path = job(tmp_path, bert, 256)
    assert command("validate", str(path)) == command("plan", str(path)) == 2
    said = capsys.readouterr().err
    assert (
        said.count(
            "data.max_length = 256: a roberta model has no positions beyond 128 (max_position_embeddings 130"
        )
        == 2
    )
    assert "write 128 or less" in said
    assert command("validate", str(path), "--set", "data.max_length=128") == 0


def test_longer_than_a_rotary_model_was_made_for_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job(tmp_path, model(tmp_path / "llama"), 96)
    assert command("validate", str(path)) == 0
    assert "note: data.max_length = 96: the model was made for 64 positions" in capsys.readouterr().out
    decided = plan(load(path), 1)
    assert [decision.value for decision in decided.decisions if decision.key == "data.max_length"] == [96]


@pytest.mark.parametrize("name", ["plan", "render", "submit --dry-run", "run"])
def test_tokens_without_a_row_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job(tmp_path, model(tmp_path / "llama", added=("<|x|>", "<|y|>")))
    out = ["--out", str(tmp_path / "out")] if name == "render" else []
    assert command(*name.split(), str(path), *out) == 2
    said = capsys.readouterr().err
    assert (
        "the tokenizer has 8 tokens and the embedding 6 rows (vocab_size): there is none for '<|x|>' "
        "(6), '<|y|>' (7)" in said
    )
    assert "model.resize_embeddings: true" in said


def test_new_rows_are_counted_by_the_planner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = model(tmp_path / "llama", added=("<|x|>", "<|y|>"))
    path = job(tmp_path, directory, resize_embeddings=True)
    assert command("validate", str(path)) == 0
    assert "It gets 2 new rows, the mean of the old ones" in capsys.readouterr().out
    assert config_of(load(path).model) == LLAMA | {"vocab_size": 8}
    assert config_of(Model(name=str(directory))) == LLAMA


def test_rows_may_be_left_as_they_are_where_no_text_has_such_a_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = job(tmp_path, model(tmp_path / "llama", added=("<|x|>",)), resize_embeddings=False)
    assert command("validate", str(path)) == 0
    assert "Data with such a token will be refused" in capsys.readouterr().out
    assert config_of(load(path).model) == LLAMA


def test_layers_that_can_have_no_adapter(tmp_path: Path) -> None:
    directory = model(
        tmp_path / "mamba",
        {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 6},
    )
    [remark] = suitability.check(load(job(tmp_path, directory, adapter={})))
    assert "out_proj of a mamba model can have no adapter" in str(remark)
    assert suitability.check(load(job(tmp_path, directory, adapter={"targets": ["in_proj"]}))) == []
    with pytest.raises(
        ConfigurationError, match=r"model.adapter.targets.*out_proj.*name others, or write all-linear"
    ):
        suitability.check(load(job(tmp_path, directory, adapter={"targets": ["in_proj", "*_proj"]})))
    assert (
        suitability.check(load(job(tmp_path, model(tmp_path / "llama"), adapter={"targets": ["out_proj"]})))
        == []
    )


def test_tokens_of_images_need_no_row(tmp_path: Path) -> None:
    """As of a model for text whose tokenizer knows images too."""
    path = job(
        tmp_path, model(tmp_path / "a", added=("<image_soft_token>",), image_token="<image_soft_token>")
    )
    assert suitability.check(load(path)) == []
    path = job(tmp_path, model(tmp_path / "b", added=("<image_soft_token>",)))
    with pytest.raises(ConfigurationError, match="<image_soft_token>"):
        suitability.check(load(path))


def test_tokens_wherever_they_are_written_down(tmp_path: Path) -> None:
    directory = model(
        tmp_path,
        added=("<|x|>",),
        pad_token="<pad>",
        bos_token={"content": "<s>"},
        added_tokens_decoder={"9": {"content": "y"}},
    )
    (tmp_path / "added_tokens.json").write_text('{"z": 11}')
    found = read_vocabulary(str(directory))
    assert (
        found is not None
        and found.num_ids == 13
        and found.names == {6: "<|x|>", 9: "y", 11: "z", 12: "<pad>"}
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / name).unlink()
    assert read_vocabulary(str(directory)) is None
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nb\n")
    found = read_vocabulary(str(directory))
    assert found is not None and found.num_ids == 3
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    found = read_vocabulary(str(directory))
    assert found is not None and found.num_ids == 2


@pytest.mark.parametrize(
    "content",
    [
        {"model": None},
        {"model": {"vocab": 3}},
        {"model": {"vocab": {"a": "b"}}},
        {"model": {"vocab": [3]}},
        {"added_tokens": 7},
    ],
)
def test_files_that_are_none_of_a_tokenizer_tell_nothing(content: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}} | content))
    assert read_vocabulary(str(tmp_path)) is None


def adapter(folder: Path, base: Path | str, **settings: Any) -> Path:
    """An adapter's directory, its file with a header alone."""
    folder.mkdir()
    content = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(
        json.dumps(content | {"base_model_name_or_path": str(base), "lora_dropout": 0.1} | settings)
    )
    header = {
        f"base_model.model.{name}.weight": {} for name in ("model.layers.0.q_proj.lora_A", "model.norm")
    }
    header = {"prompt_embeddings": {}} if "num_virtual_tokens" in settings else header
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    return folder


IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def test_a_directory_of_ia3_is_gone_on_with(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "adapter", model(tmp_path / "base"), **IA3)
    loaded = load(job(tmp_path, directory)).model.adapter
    assert loaded is not None and loaded.method == "ia3" and loaded.weights == str(directory)
    assert (loaded.targets, loaded.feedforward) == (("down_proj", "k_proj"), ("down_proj",))


PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}


def test_a_directory_of_virtual_tokens_is_gone_on_with(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "adapter", model(tmp_path / "base"), **PROMPT)
    loaded = load(job(tmp_path, directory)).model.adapter
    assert loaded is not None and (loaded.method, loaded.virtual_tokens) == ("prompt-tuning", 8)
    assert loaded.weights == str(directory) and not loaded.train_also


def test_a_directory_of_keys_and_values_is_gone_on_with(tmp_path: Path) -> None:
    directory = adapter(
        tmp_path / "adapter", model(tmp_path / "base"), **PROMPT | {"peft_type": "PREFIX_TUNING"}
    )
    loaded = load(job(tmp_path, directory)).model.adapter
    assert loaded is not None and (loaded.method, loaded.virtual_tokens) == ("prefix-tuning", 8)


def test_what_an_encoder_put_out_is_gone_on_with_as_vectors(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "adapter", model(tmp_path / "base"), **PROMPT | {"peft_type": "P_TUNING"})
    loaded = load(job(tmp_path, directory, adapter={"method": "prompt-tuning"})).model.adapter
    assert loaded is not None and (loaded.method, loaded.virtual_tokens) == ("prompt-tuning", 8)
    for asked in ({}, {"adapter": {"method": "p-tuning"}}):
        with pytest.raises(ConfigurationError, match="method: prompt-tuning to train these vectors on"):
            load(job(tmp_path, directory, **asked))


@pytest.mark.parametrize(
    ("task", "config", "reason"),
    [
        ("causal-lm", {"model_type": "gemma3n_text"}, "a gemma3n_text model does not compute the same"),
        ("sequence-classification", {"model_type": "esm"}, "from embeddings as from tokens; write lora"),
        ("sequence-classification", {"model_type": "t5", "is_encoder_decoder": True}, "reads no embeddings"),
        ("causal-lm", {"model_type": "bart", "is_encoder_decoder": True}, None),
        ("sequence-to-sequence", {"model_type": "t5", "is_encoder_decoder": True}, None),
        ("causal-lm", {"model_type": "llama"}, None),
    ],
)
def test_models_that_virtual_tokens_cannot_stand_before(
    task: str, config: dict[str, Any], reason: str | None
) -> None:
    answer = why_no_prompt(Adapter(method="prompt-tuning"), task, config)
    assert answer is None if reason is None else reason in str(answer)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bloom"}, "a bloom model is not known to read learned keys and values as in peft"),
        ({"model_type": "qwen3_next"}, "write prompt-tuning or lora"),
        (
            {"model_type": "mixtral", "output_router_logits": True},
            "routers (output_router_logits) would count",
        ),
        ({"model_type": "mixtral", "output_router_logits": False}, None),
        ({"model_type": "gemma3_text"}, None),
        ({}, None),
    ],
)
def test_models_whose_attention_reads_no_prefix(config: dict[str, Any], reason: str | None) -> None:
    answer = why_no_prompt(Adapter(method="prefix-tuning"), "causal-lm", config)
    assert answer is None if reason is None else reason in str(answer)


def test_such_a_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    base = model(tmp_path / "base", LLAMA | {"model_type": "gemma3n_text"})
    prompted = load(job(tmp_path, base, adapter={"method": "prompt-tuning", "virtual_tokens": 4}))
    with pytest.raises(ConfigurationError, match=r"model\.adapter\.method = 'prompt-tuning': a gemma3n_text"):
        suitability.check(prompted)


@pytest.mark.parametrize("by", ["model.name", "model.adapter.weights"])
def test_an_adapters_directory_is_its_base_with_its_sizes(by: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    directory = adapter(tmp_path / "adapter", base)
    path = (
        job(tmp_path, directory)
        if by == "model.name"
        else job(tmp_path, base, adapter={"weights": "adapter"})
    )
    loaded = load(path).model
    assert loaded.name == str(base) and loaded.adapter is not None
    assert (loaded.adapter.rank, loaded.adapter.alpha, loaded.adapter.dropout) == (4, 8.0, 0.1)
    assert (loaded.adapter.targets, loaded.adapter.train_also) == (
        ("k_proj", "q_proj"),
        ("model.norm.weight",),
    )
    assert loaded.adapter.weights == str(directory)


@pytest.mark.parametrize(
    ("settings", "asked", "text"),
    [
        ({"use_qalora": True}, {}, "it uses use_qalora, which a run does not; add it to its base with peft"),
        ({"rank_pattern": {"q_proj": 8}}, {}, "it uses rank_pattern"),
        ({"peft_type": "VERA"}, {}, "its peft_type is 'VERA'"),
        ({"peft_type": "IA3"}, {}, "its target_modules or feedforward_modules are no list"),
        (IA3, {"adapter": {"method": "lora"}}, "model.adapter.method = 'lora': the adapter in .* has ia3"),
        (IA3, {"adapter": {"rank": 8}}, "model.adapter.rank = 8: is of low-rank matrices"),
        (PROMPT | {"num_virtual_tokens": None}, {}, "its num_virtual_tokens is None, and a positive number"),
        (PROMPT | {"num_transformer_submodules": 2}, {}, "it has vectors of a decoder too"),
        (PROMPT | {"modules_to_save": ["lm_head"]}, {}, "whole modules were trained with it, lm_head first"),
        (PROMPT, {"task": "sequence-classification"}, "does not say which classes its head is for; train a"),
        (PROMPT, {"adapter": {"virtual_tokens": 9}}, "model.adapter.virtual_tokens = 9: the adapter in .* 8"),
        (PROMPT, {"adapter": {"init_text": "a"}}, "has its vectors already; leave it out"),
        ({"bias": "all"}, {}, "its bias is 'all'"),
        ({"target_modules": ".*q_proj"}, {}, "its target_modules are '.*q_proj'"),
        ({"r": None}, {}, "its r is None"),
        ({"r": 0}, {}, "its r is 0"),
        ({}, {"task": "sequence-classification"}, "does not say which classes its head is for"),
        ({}, {"adapter": {"rank": 8}}, "model.adapter.rank = 8: the adapter in .* has 4"),
        ({}, {"adapter": {"init": "pissa"}}, "model.adapter.init = 'pissa': the adapter in .* has lora"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "began by pissa_niter_4, which takes a part"),
        ({"base_model_name_or_path": "./gone"}, {}, "no such directory"),
    ],
)
def test_an_adapter_that_cannot_be_gone_on_with(
    settings: dict[str, Any], asked: dict[str, Any], text: str, tmp_path: Path
) -> None:
    directory = adapter(tmp_path / "adapter", model(tmp_path / "base"), **settings)
    with pytest.raises(ConfigurationError, match=text):
        load(job(tmp_path, directory, **asked))


def test_directories_that_are_no_adapter_to_go_on_with(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    directory = adapter(tmp_path / "adapter", base)
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"there is no adapter_model\.safetensors"):
        load(job(tmp_path, directory))
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"model\.name = .*cannot be read"):
        load(job(tmp_path, directory))
    with pytest.raises(ConfigurationError, match=r"model\.adapter\.weights = 'base': holds no adapter"):
        load(job(tmp_path, base, adapter={"weights": "base"}))
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="holds a model and an adapter of peft"):
        load(job(tmp_path, base))
