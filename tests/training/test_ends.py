"""By its own generation config alone, an export's `generate` writes what launcher writes, up to the same end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertTokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    PreTrainedModel,
)

from launcher import tasks
from launcher.data.section import Source
from launcher.errors import ConfigurationError
from launcher.tasks.generation import Evaluation, Generate
from launcher.tasks.task import Sample
from launcher.training import generating
from launcher.training.inputs import TrainingInputs
from tests.distributed.data_world import byte_tokenizer
from tests.training import pairs, tiny
from tests.training.runs import causal_data, model_directory, new_run, plan_for
from tests.training.runs import tokenizer as words

LONGEST = 24


def task_of(name: str, tokenizer: Any, **columns: Any) -> Any:
    kind = tasks.find(name)
    task = kind(kind.Columns(train=Source(path="rows.jsonl"), **columns))
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=LONGEST))
    task.prepare(tokenizer)
    return task


def pair_task(tokenizer: Any) -> Any:
    return task_of("sequence-to-sequence", tokenizer, source="a", target="b")


def both_write(
    task: Any, model: PreTrainedModel, first: int, **keys: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """What launcher writes to six prompts, and what the model does by its exported generation config and by
    what the job says."""
    ids = np.random.default_rng(3).integers(first, model.config.get_text_config().vocab_size, (6, 7))
    names = ("input_ids", "labels", "targets")
    rows = [Sample(dict.fromkeys(names, row.astype(np.int32)), place, 7) for place, row in enumerate(ids)]
    prompts = task.prompts(rows)
    model.eval()
    exported = copy.deepcopy(model.generation_config)
    task.configure_generation(exported)
    exported.update(**keys, max_new_tokens=LONGEST, num_return_sequences=1)
    told = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    own = model.generate(**told, generation_config=exported)
    model.forward = model.forward  # as an engine sets one of its own
    launchers = generating.generate(model, prompts, task.generation, lambda: False, synced=False)
    begins = 1 if model.config.is_encoder_decoder else prompts["input_ids"].shape[1]
    # Beams fill with the end what is behind it, where the padding token is 0.
    padding = task.tokenizer.pad_token_id
    return launchers.tolist(), generating._padded_behind_ends(
        own[:, begins:], list(task.end_tokens), padding
    ).tolist()


def test_a_chat_ends_with_its_turn() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    task = task_of("causal-lm", tokenizer, messages="messages")
    end, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = GenerationConfig(eos_token_id=999)
    task.configure_generation(generation)
    assert (
        end != turn
        and set(generation.eos_token_id) == {end, turn, 999}
        and generation._from_model_config is False
    )
    assert generation.pad_token_id == tokenizer.pad_token_id
    before = copy.deepcopy(generation.eos_token_id)
    task.configure_generation(generation)
    assert generation.eos_token_id == before


def test_a_prompt_is_answered_up_to_the_tokenizers_end() -> None:
    """The model's own generation config has another one."""
    tokenizer = words()
    task = task_of("causal-lm", tokenizer, prompt="a", completion="b")
    model = tiny.model_of("llama", vocab_size=8, initializer_range=0.6)
    model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0)
    launchers, own = both_write(task, model, 3)
    assert launchers == own and {row.count(2) for row in own} == {0, 1}


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_decoder_made_of_a_bert_ends_at_its_separator(num_beams: int) -> None:
    """Its files say neither how an answer begins nor how it ends."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "w", "x", "y", "z"]
    task = pair_task(BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)}))
    [encoded] = task.encode([{"a": "w", "b": "x"}], task.tokenizer)
    assert task.end_tokens == [3] == encoded.arrays["labels"][-1:].tolist()
    bert = {
        **pairs.BERT,
        "vocab_size": 8,
        "num_attention_heads": 2,
        "initializer_range": 0.6,
        "hidden_dropout_prob": 0.0,
    }
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**bert), BertConfig(**bert))
    task.configure(config)
    model = EncoderDecoderModel(config=config)
    model.generation_config = GenerationConfig(num_beams=num_beams, no_repeat_ngram_size=1)
    launchers, own = both_write(task, model, 4)
    assert launchers == own and any(3 in row for row in own)


def test_a_separator_within_an_answer_does_not_end_it() -> None:
    tokenizer = words()
    tokenizer.sep_token = "w5"
    task = pair_task(tokenizer)
    [encoded] = task.encode([{"a": "w1", "b": "w4 w5 w6"}], tokenizer)
    assert task.end_tokens == [2] == encoded.arrays["labels"][-1:].tolist()
    generation = GenerationConfig(eos_token_id=2)
    task.configure_generation(generation)
    assert generation.eos_token_id == 2


def test_what_the_job_leaves_out_is_the_models_own() -> None:
    """Also what is no key of the job; what it says wins."""
    settings = {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5}
    texts = {}
    for own, keys in (({}, {}), (settings, {}), (settings, {"num_beams": 1, "no_repeat_ngram_size": 0})):
        model = pairs.model_of("bart", init_std=0.6, dropout=0.0)
        model.generation_config.update(**own, num_return_sequences=2 if own and not keys else 1)
        task = pair_task(words())
        task.evaluation = Evaluation(generate=Generate(max_new_tokens=LONGEST, **keys))
        launchers, by_itself = both_write(task, model, 4, **keys)
        assert launchers == by_itself
        texts[len(own), len(keys)] = launchers
    assert len({str(text) for text in texts.values()}) == 3, texts


def test_what_is_drawn_from_is_the_models_own_where_the_job_does_not_say() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    ids = torch.zeros((1, 1), dtype=torch.long)

    def kept(own: GenerationConfig, **keys: Any) -> int:
        drawn = generating._Drawn(Generate(do_sample=True, **keys), own, [(0, 0)])
        return int(torch.isfinite(drawn(ids, scores)).sum())

    own = GenerationConfig(top_k=2, temperature=0.5)
    assert [kept(GenerationConfig()), kept(own), kept(own, top_k=0), kept(own, top_k=1)] == [4, 2, 4, 1]
    assert kept(GenerationConfig(min_p=0.2)) == 2 and kept(GenerationConfig(top_p=0.9), top_p=1.0) == 4
    assert Generate(do_sample=True, top_p=0.5).arguments == {
        "max_new_tokens": 128, "num_beams": 1, "do_sample": True, "top_p": 0.5,
    }  # fmt: skip


def test_a_config_that_transformers_only_warns_about_is_saved_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vicuna's, which has a temperature and draws nothing: transformers saves none that it would warn about."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = model_directory(tmp_path / "model")
    own = {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 5, "temperature": 0.9, "top_p": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(own))
    plan = plan_for(directory, causal_data(tmp_path), 1, 1)
    run = new_run(tmp_path / "run", plan)
    model = AutoModelForCausalLM.from_pretrained(directory)
    TrainingInputs.of(run, plan).save_model_files(run, plan, model)
    saved = GenerationConfig.from_pretrained(run.path / "model")
    assert (saved.temperature, saved.top_p) == (0.9, 0.6) and set(saved.eos_token_id) == {2, 7}


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"typical_p": 0.0}, {"top_k": -1}])
def test_a_value_that_nothing_can_be_drawn_by_is_named(values: dict[str, Any]) -> None:
    how, [name] = Generate(max_new_tokens=4, do_sample=True), values
    with pytest.raises(ConfigurationError, match=f"{name} of the model's generation_config"):
        generating._Drawn(how, GenerationConfig(**values), [])


def test_the_entropy_of_a_draw_is_bounded_as_in_transformers() -> None:
    drawn = generating._Drawn(
        Generate(max_new_tokens=4, do_sample=True), GenerationConfig(top_h=0.3), [(0, 0)]
    )
    assert [type(one).__name__ for one in drawn._warpers] == ["TopHLogitsWarper", "TopKLogitsWarper"]
