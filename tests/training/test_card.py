"""Model cards: what huggingface_hub reads back of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.card import Card, pipeline_tag
from launcher.training.checkpoint.export import export
from launcher.training.demo.models import PACKAGES, installed
from launcher.training.demo.models import model_directory as packaged_directory
from tests.training.runs import causal_data, evaluations, finish, model_directory, new_run, plan_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two steps of LoRA on a base with a licence, as a job of the user's own."""
    folder = tmp_path_factory.mktemp("card")
    model = model_directory(folder / "tiny-llama", "llama")
    (model / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [x]\n---\n# The base\n"
    )
    plan = plan_for(model, causal_data(folder / "data"), 1, 2, model__adapter={"rank": 2})
    run = new_run(folder / "run", plan)
    job = {
        "name": "test",
        "model": {"name": str(model)},
        "data": {"train": {"path": str(folder / "data" / "train.jsonl")}},
    }
    run.job_file.write_text(yaml.safe_dump(job | {"cluster": {"account": "somebody"}}))
    finish(run, 1)
    return run


def results(card: ModelCard) -> dict[str, Any]:
    return {one.metric_type: one.metric_value for one in card.data.eval_results or []}


def test_a_merged_model_says_what_it_was_made_of(run: RunDirectory, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and card.data.library_name == "transformers"
    assert "Fine-tuned from the model in a directory that was called `tiny-llama`" in card.text
    assert "Add that model's name on the hub above, as `base_model`" in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "de"]
    measured = evaluations(run)
    assert results(card) == pytest.approx(measured[2], abs=1e-6)
    assert set(card.data.metrics) == {"perplexity", "accuracy"}
    text = card.text
    assert f"| loss | {measured[0]['loss']:.4f} | {measured[2]['loss']:.4f} |" in text
    assert "train: `train.jsonl`: 200 of 200 rows used" in text and "xxh3 of the contents" in text
    assert 'AutoModelForCausalLM.from_pretrained("DIRECTORY")' in text
    for private in (str(run.path.parent), "somebody", "cluster"):
        assert private not in text, "paths and accounts of a machine are nobody else's"


def test_an_adapter_has_the_fields_of_peft(run: RunDirectory, tmp_path: Path) -> None:
    export(run, tmp_path / "out", adapter=True)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert set(card.data.tags) == {"lora"}
    assert 'from_pretrained("DIRECTORY_OF_THAT_MODEL"' in card.text
    assert "PeftModel.from_pretrained(AutoModelForCausalLM" in card.text
    assert 'generation_config=GenerationConfig.from_pretrained("DIRECTORY")' in card.text
    assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ["hub/own", "packaged"])
def test_a_base_with_a_name_on_the_hub_is_named(name: str, run: RunDirectory, tmp_path: Path) -> None:
    plan = Plan.read(run.plan_file)
    if name == "packaged":
        if "minilm-l6" not in installed():
            pytest.skip("its package is not installed")
        name, given = PACKAGES["minilm-l6"].hub, str(packaged_directory("minilm-l6"))
    else:
        given = name
    named = plan.model_copy(update={"model": plan.model.model_copy(update={"name": given})})
    Card(run, named, 2, {}, adapter=True).write(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == name and f"base_model:adapter:{name}" in card.data.tags
    assert f"An adapter (LoRA) for `{name}`" in card.text and f'from_pretrained("{name}"' in card.text


def test_what_is_not_known_is_said(run: RunDirectory, tmp_path: Path) -> None:
    """Of a base without a card, and a step that was not evaluated."""
    plan = Plan.read(run.plan_file)
    (Path(plan.model.name) / "README.md").rename(tmp_path / "README.md")
    export(run, tmp_path / "out")
    (tmp_path / "README.md").rename(Path(plan.model.name) / "README.md")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None and "The licence of the base model was not found" in card.text


def test_a_step_without_an_evaluation_claims_no_metrics(run: RunDirectory, tmp_path: Path) -> None:
    plan = Plan.read(run.plan_file)
    other = new_run(
        tmp_path / "run", plan.model_copy(update={"length": plan.length.model_copy(update={"value": 3})})
    )
    finish(other, 1, stop_at=1)
    export(other, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results is None and "Step 1 itself was not evaluated" in card.text


def test_tags_of_pipelines_by_the_class_of_the_model() -> None:
    named = {
        "bert": "BertForSequenceClassification",
        "roberta": "RobertaForMaskedLM",
        "t5": "T5ForConditionalGeneration",
    }
    tags = [pipeline_tag({"model_type": kind, "architectures": [name]}) for kind, name in named.items()]
    assert tags == ["text-classification", "fill-mask", "text2text-generation"]
    assert pipeline_tag({"model_type": "own", "architectures": ["Own"]}) is None and pipeline_tag({}) is None
