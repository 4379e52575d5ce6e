"""What lies beside a model's weights goes along, its own code runs where it is trusted, and an adapter is
what peft makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launcher.errors import ConfigurationError
from launcher.job.load import load as load_job
from launcher.launch.evaluation import Request, evaluate_locally
from launcher.launch.screen import Watcher
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.model import model_files, pretrained
from tests.training.plans import plan_of
from tests.training.runs import (
    causal_data,
    evaluations,
    finish,
    model_directory,
    new_run,
    plan_for,
    texts,
    tokenizer,
    write_rows,
)

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SMALL |= {"num_key_value_heads": 1, "head_dim": 16}


@pytest.fixture(autouse=True)
def _no_code_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers puts on the path would be handed to the ranks, who have a cache of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def with_own_code(path: Path) -> Path:
    """A model whose classes stand in its own directory, one of them in a package there."""
    model_directory(path, "llama", **SMALL)
    (path / "configuration_tiny.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass TinyConfig(LlamaConfig):\n    model_type = "
        "'tiny-own'\n"
    )
    (path / "modeling_tiny.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n\n\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    config = json.loads((path / "config.json").read_text())
    own = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    config |= {"model_type": "tiny-own", "architectures": ["TinyForCausalLM"], "auto_map": own}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("adapter", [None, {"rank": 2}], ids=["whole", "adapter"])
def test_trusted_code_runs_and_goes_along(adapter: dict[str, Any] | None, tmp_path: Path) -> None:
    directory, data = with_own_code(tmp_path / "model"), causal_data(tmp_path / "data")
    more = {} if adapter is None else {"model__adapter": adapter}
    run = new_run(tmp_path / "run", plan_for(directory, data, 2, 2, model__trust_remote_code=True, **more))
    finish(run, 2)
    export(run, tmp_path / "out", dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "TinyForCausalLM" and type(loaded).__module__.startswith(
        "transformers_modules"
    )
    if adapter is not None:
        export(run, tmp_path / "adapter", adapter=True)
        base = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        ids = torch.arange(3, 60).view(1, -1)
        with torch.no_grad():
            alone = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
            torch.testing.assert_close(alone, loaded.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_code_that_is_not_trusted_or_cannot_be_used_is_refused(tmp_path: Path) -> None:
    directory = with_own_code(tmp_path / "model")
    with pytest.raises(ConfigurationError, match=r"model\.name.*custom code"):
        pretrained.read_config(plan_of(directory))
    plan = plan_of(directory, model__trust_remote_code=True)
    config = pretrained.read_config(plan)
    (directory / "modeling_tiny.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(
        ConfigurationError,
        match=r"its own code \(modeling_tiny.TinyForCausalLM\) cannot be used: .*a_module_that_is_not_there",
    ):
        pretrained.model_class(AutoModelForCausalLM, config, plan)
    with pytest.raises(ConfigurationError, match="a tiny-own model cannot do causal-lm"):
        pretrained.model_class(AutoModelForSequenceClassification, config, plan)


@pytest.mark.distributed
def test_what_lies_beside_the_weights_is_in_the_export(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", "llama", **SMALL)
    words = tokenizer()
    words.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    words.save_pretrained(directory)
    (directory / "code").mkdir()
    for name in (
        "preprocessor_config.json",
        "LICENSE",
        "code/helper.py",
        "README.md",
        "training_args.bin",
        "rows.jsonl",
    ):
        (directory / name).write_text("{}")
    (directory / "code" / "notes.txt").write_text("not code")
    run = new_run(tmp_path / "run", plan_for(directory, causal_data(tmp_path / "data"), 1, 1))
    finish(run, 1)
    export(run, tmp_path / "out")
    found = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {
        "preprocessor_config.json",
        "LICENSE",
        "code/helper.py",
        "generation_config.json",
        "model.safetensors",
    } <= found
    assert found.isdisjoint({"training_args.bin", "code/notes.txt", "rows.jsonl"})
    assert (tmp_path / "out" / "README.md").read_text() != "{}", "the card is this model's own"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == words.chat_template


def test_what_describes_a_model_of_embeddings_is_left_out(tmp_path: Path) -> None:
    """As all-MiniLM-L6-v2 has it: a fine-tuned classifier has no pooling of its own."""
    own = ["config.json", "data_config.json", "sentence_other.json", "tokenizer.json", "vocab.txt"]
    for name in (*own, "config_sentence_transformers.json", "train_results.json"):
        (tmp_path / name).write_text("{}")
    assert [str(path) for path in model_files.kept(tmp_path)] == own, "data_config.json may be anything's"
    (tmp_path / "1_Pooling").mkdir()
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "sentence_xlnet_config.json",
        "1_Pooling/config.json",
    ):
        (tmp_path / name).write_text("[]")
    own.remove("data_config.json")
    assert [str(path) for path in model_files.kept(tmp_path)] == own


def test_code_of_the_hubs_cache_is_named_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text("")
    references = {
        "AutoModel": "org/name--modeling_own.Own",
        "AutoConfig": "org/name--configuration_own.Own",
        "AutoOther": "other/x--y.Z",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": references}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["org/name--modeling_own.T", None]}})
    )
    model_files.name_own_code(tmp_path, plan_of(Path("org/name")))
    found = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert found == references | {"AutoModel": "modeling_own.Own"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["auto_map"] == {
        "AutoTokenizer": ["modeling_own.T", None]
    }


def _loss(model: Any, words: Any, lines: list[str]) -> float:
    """Mean over the learned tokens, each text by itself."""
    total = count = 0.0
    for line in lines:
        ids = torch.tensor([[*words(line, add_special_tokens=False)["input_ids"], words.eos_token_id]])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model whose head is its embedding, and its rows."""
    folder = tmp_path_factory.mktemp("tied")
    return model_directory(folder / "model", "llama", **SMALL, tie_word_embeddings=True), causal_data(
        folder / "data"
    )


def adapted(tmp_path: Path, model: Path, data: dict[str, Any], world_size: int, *also: str) -> RunDirectory:
    adapter = {"rank": 2, "alpha": 8, "train_also": also}
    training = {"learning_rate": 1e-2}
    run = new_run(
        tmp_path / f"run-{world_size}",
        plan_for(model, data, world_size, 3, training=training, model__adapter=adapter),
    )
    finish(run, world_size)
    return run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ties", "also", "world_size"),
    [
        (True, "model.embed_tokens.*", 1),
        (True, "*embed_tokens*", 2),
        (False, "model.embed_tokens.*", 1),
        (False, "lm_head.*", 1),
    ],
)
def test_peft_has_the_runs_loss_of_an_embedding_that_trained(
    ties: bool, also: str, world_size: int, tmp_path: Path
) -> None:
    model = model_directory(tmp_path / "model", "llama", **SMALL, tie_word_embeddings=ties)
    run = adapted(tmp_path, model, causal_data(tmp_path / "data", packing=False), world_size, also)
    export(run, tmp_path / "out", adapter=True)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path / "out"
    )
    lines = list(texts(24, seed=1))
    base = _loss(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer(), lines)
    export(run, tmp_path / "merged")
    after = _loss(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokenizer(), lines)
    assert _loss(loaded, tokenizer(), lines) == pytest.approx(after, rel=1e-5) and abs(after - base) > 0.005


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_head_of_a_tied_pair_is_named_by_the_embedding(
    world_size: int, tied: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="a head that is tied to the embedding has the embedding's name"):
        adapted(tmp_path, *tied, world_size, "lm_head.*")


@pytest.mark.slow
@pytest.mark.distributed
def test_an_adapter_is_gone_on_with(tied: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """It begins where the run before ended, on any number of ranks, of an embedding that trained too."""
    model, data = tied
    first = adapted(tmp_path, model, data, 1, "model.embed_tokens.*")
    export(first, tmp_path / "adapter", adapter=True)
    job = tmp_path / "job.yaml"
    job.write_text(
        json.dumps(
            {"name": "b", "model": {"name": "./adapter"}, "data": data, "cluster": {"gpus_per_node": 0}}
        )
    )
    asked = load_job(job).model
    assert asked.adapter is not None and asked.adapter.train_also == (
        "lm_head.weight",
        "model.embed_tokens.weight",
    )
    for world_size in (1, 2):
        changes = {
            "model__adapter": asked.adapter.model_dump(mode="json"),
            "training": {"learning_rate": 1e-2},
        }
        run = new_run(
            tmp_path / f"second-{world_size}", plan_for(Path(asked.name), data, world_size, 2, **changes)
        )
        finish(run, world_size)
        assert evaluations(run)[0]["loss"] == pytest.approx(evaluations(first)[3]["loss"], rel=1e-5)
        assert evaluations(run)[2]["loss"] < evaluations(run)[0]["loss"]
    wider = asked.adapter.model_copy(update={"rank": 3})
    run = new_run(
        tmp_path / "wider",
        plan_for(Path(asked.name), data, 1, 2, model__adapter=wider.model_dump(mode="json")),
    )
    with pytest.raises(AssertionError, match=r"the adapter is not of this model: it has in another size"):
        finish(run, 1)
    fewer = asked.adapter.model_copy(update={"targets": ("q_proj",)})
    run = new_run(
        tmp_path / "fewer",
        plan_for(Path(asked.name), data, 1, 2, model__adapter=fewer.model_dump(mode="json")),
    )
    with pytest.raises(AssertionError, match=r"it has, and the model does not,"):
        finish(run, 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_evaluate_goes_by_the_classes_of_the_model_itself(tmp_path: Path) -> None:
    """Of two models with the same classes in different orders each is right about what it says."""
    lines = list(texts(24))
    said = {}
    for name, labels in (("job", ["no", "yes"]), ("other", ["YES", "NO"])):
        order = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }
        path = model_directory(
            tmp_path / name,
            "llama",
            "AutoModelForSequenceClassification",
            seed=len(said),
            num_labels=2,
            **order,
            **SMALL,
        )
        model, words = (
            AutoModelForSequenceClassification.from_pretrained(path).eval(),
            AutoTokenizer.from_pretrained(path),
        )
        with torch.no_grad():
            ids = [
                int(model(input_ids=torch.tensor([words(text)["input_ids"]])).logits[0].argmax())
                for text in lines
            ]
        said[name] = [labels[number].lower() for number in ids]
    rows = [{"text": text, "label": label} for text, label in zip(lines, said["other"], strict=True)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    data = {
        "train": source,
        "evaluation": source,
        "text": "text",
        "label": "label",
        "max_length": 64,
        "num_workers": 1,
    }
    task = {"task": "sequence-classification", "model__task": "sequence-classification", "attention": "sdpa"}
    plan = plan_for(tmp_path / "job", data, 1, 1, **task)
    result = evaluate_locally(Request(plan, None, str(tmp_path / "other"), None), Watcher())
    agreed = sum(first == second for first, second in zip(said["job"], said["other"], strict=True)) / len(
        lines
    )
    assert result["after"]["accuracy"] == 1.0 and result["before"]["accuracy"] == pytest.approx(agreed)
