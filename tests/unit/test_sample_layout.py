"""How samples share a pass: by the architecture, never refused later, and refused at once where no way gives
the model's own loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.planner.hardware.detect import Hardware
from launcher.planner.model import model_support
from launcher.planner.model.model_support import Way, read_table, support, untried
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job as plan
from tests.unit.test_planning_decide import CPU, H100, job


def planned(kind: str, hardware: Hardware = CPU, **changes: Any) -> Plan:
    """The plan of a model with nothing but a type: for tasks that it can do, all that its layout needs."""
    return plan(job(model__config={"model_type": kind}, **changes), hardware=hardware)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("llama", ("packed", "packed", "chunked")),
        ("gemma2", ("packed", "packed", "chunked")),
        ("gpt_oss", ("packed", "packed", "chunked")),
        ("lfm2", ("padded", "sdpa", "chunked")),
        ("falcon_h1", ("padded", "sdpa", "model")),
        ("bloom", ("padded", "eager", "chunked")),
    ],
)
def test_auto_takes_a_way_that_is_right(kind: str, way: tuple[str, str, str]) -> None:
    made = planned(kind)
    assert (made.layout, made.attention, made.head) == way
    assert Way(*way) in support("causal-lm", {"model_type": kind}).ways


def test_every_entry_of_the_table_has_a_way_or_a_reason() -> None:
    table = read_table()
    for task in set(tasks.TASKS) - {"multi-task"}:  # which has the ways that its tasks have in common
        for kind, entry in table[task].items():
            known = support(task, {"model_type": kind})
            assert bool(known.ways) != bool(known.refused), (task, kind)
            assert "\n" not in known.refused
            assert kind in table["types"]
            assert entry


def test_an_attention_with_which_the_loss_would_be_another_is_refused_with_those_that_can() -> None:
    assert planned("llama", model__attention="eager").attention == "eager"
    with pytest.raises(
        ConfigurationError, match=r"model\.attention = 'sdpa': a bloom model.*write eager or auto"
    ):
        planned("bloom", model__attention="sdpa")


def test_packing_is_refused_where_samples_would_see_each_other() -> None:
    assert planned("llama", data__packing=True).layout == "packed"
    with pytest.raises(
        ConfigurationError, match=r"data\.packing = True: samples of a lfm2 model .* write false"
    ):
        planned("lfm2", data__packing=True)


def test_a_model_that_cannot_do_the_task_is_refused_with_what_it_can() -> None:
    with pytest.raises(ConfigurationError, match="a vit model cannot do causal-lm"):
        planned("vit")
    with pytest.raises(
        ConfigurationError, match="cannot do causal-lm; it can do masked-lm, question-answering, sequence-"
    ):
        planned("distilbert")


@pytest.mark.parametrize(
    ("task", "kind", "said"),
    [
        ("masked-lm", "llama", "other types can do masked-lm, such as bert, distilbert, roberta, deberta-v2"),
        (
            "masked-lm",
            "bart",
            "reads one sequence and writes another; masked-lm is for encoders such as BERT",
        ),
        (
            "token-classification",
            "bart",
            "other types can do token-classification, such as llama, qwen3, bert",
        ),
        ("question-answering", "gemma", "other types can do question-answering, such as llama, qwen3, bert"),
        ("question-answering", "lxmert", "needs an image beside the question"),
        ("sequence-to-sequence", "bert", "other types can do sequence-to-sequence, such as t5, bart, marian"),
        ("sequence-to-sequence", "voxtral", "reads sound"),
    ],
)
def test_a_type_that_has_no_class_for_a_newer_task_is_refused_in_one_line(
    task: str, kind: str, said: str
) -> None:
    known = support(task, {"model_type": kind})
    assert not known.ways
    assert said in known.refused
    assert "\n" not in known.refused


@pytest.mark.parametrize(
    ("task", "kind", "way"),
    [
        ("masked-lm", "bert", ("packed", "packed", "model")),
        ("masked-lm", "esm", ("padded", "sdpa", "model")),
        ("masked-lm", "convbert", ("single", "eager", "model")),
        ("token-classification", "gemma2", ("padded", "eager", "chunked")),
        ("question-answering", "fnet", ("single", "eager", "chunked")),
        ("sequence-to-sequence", "marian", ("padded", "sdpa", "chunked")),
    ],
)
def test_a_newer_task_takes_the_way_that_was_found_right(
    task: str, kind: str, way: tuple[str, str, str]
) -> None:
    assert support(task, {"model_type": kind}).ways[0] == Way(*way)


def test_positions_that_follow_the_longest_sample_count_in_every_task() -> None:
    config = {"model_type": "phi3", "rope_parameters": LONG}
    assert {way.layout for way in support("token-classification", config, max_length=65).ways} == {"single"}
    assert support("token-classification", config, max_length=64).ways[0].layout == "padded"


def test_the_type_of_a_composite_counts_and_not_that_of_its_text() -> None:
    nested = {"model_type": "gemma3", "text_config": {"model_type": "bamba", "z_loss_coefficient": 0.1}}
    assert support("causal-lm", nested).ways


def test_what_the_table_does_not_have_is_held_to_its_own_loss_after_loading() -> None:
    made = planned("of_next_year")
    assert (made.layout, made.attention, made.head) == untried("causal-lm").ways[0]
    assert "after loading" in next(
        decision.reason for decision in made.decisions if decision.key == "model.attention"
    )
    assert support("causal-lm", {"model_type": "llama", "auto_map": {}}, trust_remote_code=True) is untried(
        "causal-lm"
    )


def test_a_config_that_is_not_here_is_looked_at_again() -> None:
    made = plan(job(), hardware=CPU)
    assert (made.layout, made.attention, made.head) == ("packed", "packed", "chunked")
    assert "not here" in next(
        decision.reason for decision in made.decisions if decision.key == "model.attention"
    )


@pytest.fixture
def one_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "types": ["alone"],
        "causal-lm": {"alone": {"ways": ["single sdpa"]}},
        "sequence-classification": {},
    }
    monkeypatch.setattr(model_support, "read_table", lambda: table)


@pytest.mark.usefixtures("one_a_pass")
def test_one_sample_a_pass() -> None:
    made = planned("alone")
    assert (made.layout, made.batch.micro_batch_size) == ("single", 1)
    with pytest.raises(ConfigurationError, match=r"batch\.micro_batch_size = 4: .* write 1"):
        planned("alone", batch__micro_batch_size=4)


def test_flash_attention_goes_with_classes_that_ask_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert planned("llama", H100, model__attention="flash_attention_2").attention == "flash_attention_2"
    with pytest.raises(ConfigurationError, match="write eager or auto"):
        planned("bloom", H100, model__attention="flash_attention_2")


def test_plans_of_before_have_the_layout_of_their_task(tmp_path: Path) -> None:
    made = json.loads(planned("llama").to_json())
    del made["layout"], made["head"]
    (tmp_path / "plan.json").write_text(json.dumps(made))
    assert Plan.read(tmp_path / "plan.json").layout == "packed"
    (tmp_path / "plan.json").write_text(json.dumps(made | {"task": "sequence-classification"}))
    assert Plan.read(tmp_path / "plan.json").layout == "padded"


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64}


def test_values_of_a_config_change_what_is_right() -> None:
    def known(config: dict[str, Any], max_length: int = 100) -> model_support.Support:
        return support("causal-lm", config, max_length=max_length)

    assert [way.attention for way in known({"model_type": "falcon", "alibi": True}).ways] == ["eager"]
    assert "is_decoder: true" in known({"model_type": "bert"}).refused
    assert known({"model_type": "bert", "is_decoder": True}).ways
    assert "z_loss_coefficient: 0.1" in known({"model_type": "bamba", "z_loss_coefficient": 0.1}).refused
    assert known({"model_type": "bamba", "z_loss_coefficient": 0.0}).ways


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_rotary_frequencies_that_follow_the_longest_sample(where: str) -> None:
    def known(max_length: int, **rope: Any) -> model_support.Support:
        return support("causal-lm", {"model_type": "phi3", where: LONG | rope}, max_length=max_length)

    assert {way.layout for way in known(65).ways} == {"single"}
    assert known(64).ways[0].layout == "packed"
    assert "data.max_length: 64" in known(65, rope_type="dynamic").refused
    assert known(65, rope_type="yarn").ways[0].layout == "packed"
    nested = {
        "model_type": "gemma3_text",
        where: {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}},
    }
    assert support("causal-lm", nested, max_length=65).ways[0].layout == "single"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        (
            {"model_type": "gemma3", "text_config": {"use_bidirectional_attention": True}},
            "use_bidirectional_attention: true",
        ),
        (
            {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
            "use_bidirectional_attention: all",
        ),
        ({"model_type": "llama", "is_causal": False}, "is_causal: false"),
        (
            {
                "model_type": "gemma3",
                "text_config": {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic"}},
            },
            "longest",
        ),
    ],
)
def test_a_value_that_makes_it_another_model_is_refused_wherever_it_stands(
    config: dict[str, Any], said: str
) -> None:
    known = support("causal-lm", config, max_length=128)
    assert not known.ways and said in known.refused
    assert support(
        "sequence-classification", {"model_type": "gemma", "use_bidirectional_attention": True}
    ).ways
    assert support("causal-lm", {"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}).ways
