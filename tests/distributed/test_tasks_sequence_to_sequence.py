"""Pairs of texts as an encoder-decoder reads and writes them, and what of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer
from transformers import (
    GemmaTokenizer,
    GenerationConfig,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    SeamlessM4TConfig,
    SeamlessM4TTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.runs.layout import RunDirectory
from launcher.tasks.generation import Evaluation, Generate, options_of
from launcher.tasks.sequence_to_sequence import PairColumns, SequenceToSequence
from launcher.tasks.task import AnswerOptions, Output, Sample
from launcher.tasks.writing import from_bytes
from launcher.training.inputs import TrainingInputs
from tests.distributed.data_world import plan_of
from tests.encoding import arrays_of
from tests.training.runs import tokenizer as words

ROW = {"de": "w1 w2 w3", "en": "w4 w5"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    made = words()
    made.model_max_length = 1_000_000
    return made


def task_of(tokenizer: Any = None, evaluation: Evaluation | None = None, **keys: Any) -> SequenceToSequence:
    columns = PairColumns(**{"train": Source(path="rows.jsonl"), "source": "de", "target": "en", **keys})
    task = tasks.find("sequence-to-sequence")(columns)
    assert isinstance(task, SequenceToSequence)
    task.evaluation = evaluation or Evaluation()
    task.prepare(tokenizer or word_tokenizer())
    return task


def test_both_texts_become_tokens_with_their_ends() -> None:
    tokenizer = word_tokenizer()
    arrays = arrays_of(task_of(prefix="w9 "), ROW, tokenizer)
    assert tokenizer.convert_ids_to_tokens(arrays["input_ids"].tolist()) == [
        "<s>",
        "w9",
        "w1",
        "w2",
        "w3",
        "</s>",
    ]
    assert tokenizer.convert_ids_to_tokens(arrays["labels"].tolist()) == ["<s>", "w4", "w5", "</s>"]
    [encoded] = task_of().encode([ROW], tokenizer)
    assert (encoded.num_supervised, encoded.length, encoded.cut) == (4, 9, False)  # type: ignore[union-attr]


def test_each_text_is_cut_at_a_length_of_its_own_and_keeps_its_end() -> None:
    tokenizer, row = word_tokenizer(), {"de": "w1 " * 20, "en": "w2 " * 30}
    [encoded] = task_of(max_length=10, max_target_length=12).encode([row], tokenizer)
    assert not isinstance(encoded, RowProblem) and encoded.cut and encoded.length == 22
    assert [encoded.arrays[name][-1] for name in ("input_ids", "labels")] == [tokenizer.eos_token_id] * 2
    with pytest.raises(
        RowProblem,
        match="22 tokens of the source, and max_length is 10; 32 tokens of the target, and max_target_length is 12",
    ):
        arrays_of(task_of(max_length=10, max_target_length=12, too_long="refuse"), row, tokenizer)


def test_a_target_ends_though_the_tokenizer_puts_no_end_there() -> None:
    """Gemma's puts none, and T5Gemma's targets are tokenised by it."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefgh"]
    tokenizer = GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    assert 1 not in tokenizer(text_target="abc")["input_ids"]
    row, labels = {"de": "ab", "en": "cde"}, [6, 7, 8, 1]
    for written in (row, row | {"en": "cde<eos>"}):
        [encoded] = task_of(tokenizer).encode([written], tokenizer)
        assert not isinstance(encoded, RowProblem) and not encoded.cut
        assert encoded.arrays["labels"].tolist() == labels and encoded.num_supervised == 4
        assert encoded.arrays["input_ids"].tolist() == tokenizer("ab")["input_ids"]
    long = row | {"en": "abcdefgh"}
    [encoded] = task_of(tokenizer, max_target_length=8).encode([long], tokenizer)
    assert not isinstance(encoded, RowProblem) and encoded.cut
    assert encoded.arrays["labels"].tolist() == [*range(4, 11), 1]
    with pytest.raises(RowProblem, match="9 tokens of the target, and max_target_length is 8"):
        arrays_of(task_of(tokenizer, max_target_length=8, too_long="refuse"), long, tokenizer)


def test_an_end_token_before_a_target_is_the_decoders_start_and_is_not_learned() -> None:
    """SeamlessM4T's tokenizer puts one there: a model that learned it would write nothing else."""
    codes = ["__eng__", "__deu__"]
    words = ["<pad>", "<unk>", "<s>", "</s>", *codes, *"abcdefgh"]
    tokenizer = SeamlessM4TTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], additional_special_tokens=codes
    )
    task = task_of(tokenizer, source_language="__deu__", target_language="__eng__", max_target_length=8)
    row = {"de": "ab", "en": "cd"}
    whole = tokenizer(text_target="cd")["input_ids"]
    assert whole[:2] == [3, 4] and whole[-1] == 3
    [encoded] = task.encode([row], tokenizer)
    assert not isinstance(encoded, RowProblem) and not encoded.cut
    assert encoded.arrays["labels"].tolist() == whole[1:] and encoded.num_supervised == len(whole) - 1
    assert encoded.arrays["input_ids"].tolist() == [5, *tokenizer("ab")["input_ids"][1:]]
    assert task.generation.arguments["forced_bos_token_id"] == 4
    [encoded] = task.encode([row | {"en": "cdefghabc"}], tokenizer)
    assert not isinstance(encoded, RowProblem) and encoded.cut
    labels = encoded.arrays["labels"].tolist()
    assert len(labels) == 8 and labels[0] == 4 and labels[-1] == 3
    config = SeamlessM4TConfig(vocab_size=len(words))
    task.configure(config)
    assert config.decoder_start_token_id == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"de": "w1"}, "missing key: no 'en'; the row has 'de'"),
        ({"de": "w1", "en": None}, "missing key: 'en' is null"),
        ({"de": " ", "en": "w1"}, "empty: 'de' has no text"),
        ({"de": "w1", "en": ["w1"]}, "'en' is a list, not text"),
        (ROW | {"more": [3]}, "'more' is not a list of texts"),
        (ROW | {"more": []}, "'more' is not a list of texts"),
    ],
)
def test_what_is_no_pair_is_left_out_with_its_reason(row: dict[str, Any], message: str) -> None:
    generating = Evaluation(generate=Generate())
    with pytest.raises(RowProblem, match=message):
        arrays_of(task_of(evaluation=generating, references="more"), row, word_tokenizer())


def test_references_are_those_of_the_row_or_its_target() -> None:
    task = task_of(evaluation=Evaluation(generate=Generate()), references="more")
    found = [
        from_bytes(arrays_of(task, ROW | more, word_tokenizer())["references"])
        for more in ({}, {"more": None}, {"more": ""}, {"more": "w7"}, {"more": ["w7", "w8 w9"]})
    ]
    assert found == [["w4 w5"], ["w4 w5"], ["w4 w5"], ["w7"], ["w7", "w8 w9"]]
    written = ('["w7", "w8 w9"]', "['w7', 'w8 w9']", "[w7] w8", "[7]")
    found = [
        from_bytes(arrays_of(task, ROW | {"more": one}, word_tokenizer())["references"]) for one in written
    ]
    assert found == [["w7", "w8 w9"], ["w7", "w8 w9"], ["[w7] w8"], ["[7]"]], "as a table has lists"
    assert "references" not in arrays_of(task_of(references="more"), ROW, word_tokenizer()), (
        "none without writing"
    )


def test_rows_that_are_asked_need_no_target() -> None:
    task = task_of()
    task.for_prediction = True
    assert task.generates and task.texts({"de": "w1"}) == ["w1"]
    [encoded] = task.encode([{"de": "w1 w2"}], word_tokenizer())
    assert not isinstance(encoded, RowProblem)
    sample = Sample(encoded.arrays, 0, encoded.length)
    batch, ids = task.collate([[sample]]), word_tokenizer()(["w3 w4"], return_tensors="pt")["input_ids"]
    output = Output(ids.sum(), ids.sum(), generated=ids)
    assert task.answers(output, batch, [sample], AnswerOptions()) == [{"text": "w3 w4"}]


def multilingual(kind: type) -> Any:
    """A tokenizer of a multilingual model with three words."""
    pieces = [
        ("<s>", 0.0),
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁one", -1.0),
        ("▁two", -1.0),
        ("▁", -2.0),
    ]
    return kind(
        vocab=pieces
        if kind is MBartTokenizer
        else {piece: number for number, (piece, _) in enumerate(pieces)}
    )


def test_a_language_code_begins_or_ends_what_is_read() -> None:
    task = task_of(multilingual(MBartTokenizer), source_language="de_DE", target_language="en_XX")
    tokenizer = task.tokenizer
    arrays = arrays_of(task, {"de": "one two", "en": "two"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(arrays["input_ids"].tolist())[-2:] == ["</s>", "de_DE"]
    assert tokenizer.convert_ids_to_tokens(arrays["labels"].tolist())[-2:] == ["</s>", "en_XX"]
    config = T5Config(decoder_start_token_id=2)
    task.configure(config)
    assert config.decoder_start_token_id == tokenizer.convert_tokens_to_ids("en_XX")
    assert "forced_bos_token_id" not in task.generation.arguments
    # A generation config may lie with the model that begins with another language.
    generation = GenerationConfig(decoder_start_token_id=2)
    task.configure_generation(generation)
    assert generation.decoder_start_token_id == config.decoder_start_token_id
    assert task.generation.arguments["decoder_start_token_id"] == config.decoder_start_token_id


def test_a_language_code_that_comes_first_is_written_first() -> None:
    task = task_of(multilingual(NllbTokenizer), source_language="deu_Latn", target_language="eng_Latn")
    code = task.tokenizer.convert_tokens_to_ids("eng_Latn")
    assert arrays_of(task, {"de": "one", "en": "two"}, task.tokenizer)["labels"][0] == code
    assert task.generation.arguments["forced_bos_token_id"] == code


def test_an_export_begins_what_it_writes_with_the_language_too(tmp_path: Path) -> None:
    task = task_of(multilingual(NllbTokenizer), source_language="deu_Latn", target_language="eng_Latn")
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(task.tokenizer), decoder_start_token_id=2, **sizes)
    model = T5ForConditionalGeneration(config)
    run, plan = RunDirectory(tmp_path), plan_of(task.data, "sequence-to-sequence")
    TrainingInputs(config, task.tokenizer, task, None, None).save_model_files(run, plan, model)  # type: ignore[arg-type]
    written = GenerationConfig.from_pretrained(tmp_path / "model")
    assert written.forced_bos_token_id == task.tokenizer.convert_tokens_to_ids("eng_Latn")
    assert model.generation_config.forced_bos_token_id is None


def test_a_saved_tokenizer_cuts_nothing_though_the_last_text_was_cut(tmp_path: Path) -> None:
    """Programs that read tokenizer.json alone would go by what the last call left there."""
    task, long = task_of(max_length=8), {"de": "w1 " * 20, "en": "w2 " * 200}
    assert arrays_of(task, long, task.tokenizer)["input_ids"].shape == (8,)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(task.tokenizer), decoder_start_token_id=2, **sizes)
    model, run = T5ForConditionalGeneration(config), RunDirectory(tmp_path)
    plan = plan_of(task.data, "sequence-to-sequence")
    TrainingInputs(config, task.tokenizer, task, None, None).save_model_files(run, plan, model)  # type: ignore[arg-type]
    saved = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert saved.truncation is None and saved.padding is None
    assert len(saved.encode(long["de"]).ids) == 22


def test_without_a_language_the_models_own_generation_config_is_kept() -> None:
    generation = GenerationConfig(forced_bos_token_id=5, decoder_start_token_id=6)
    task_of().configure_generation(generation)
    assert (generation.forced_bos_token_id, generation.decoder_start_token_id) == (5, 6)


def test_language_codes_that_are_not_there() -> None:
    with pytest.raises(
        ConfigurationError, match=r"has no language codes; leave it out, or say the language in data\.prefix"
    ):
        task_of(source_language="de")
    with pytest.raises(ConfigurationError, match="the tokenizer has no such language code") as caught:
        task_of(multilingual(MBartTokenizer), target_language="en")
    assert caught.value.problems[0].key == "data.target_language"


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigurationError, match="no padding token"):
        task_of(tokenizer)


def test_what_is_written_ends_at_the_first_stop_string() -> None:
    task = task_of(evaluation=Evaluation(generate=Generate(stop_strings=("w5", "w7"))))
    ids = np.array(word_tokenizer()("w1 w7 w2 w5 w3")["input_ids"] + [0, 0])
    assert task.decode(ids) == "w1"
    arguments = options_of(task.settings, task.tokenizer).arguments
    assert arguments["stop_strings"] == ["w5", "w7"] and arguments["tokenizer"] is task.tokenizer


def test_an_example_has_a_target_as_long_as_its_share() -> None:
    example = task_of(max_length=64, max_target_length=16).example(32)
    assert (len(example["input_ids"]), len(example["labels"]), example.length) == (32, 8, 40)


def job(folder: Path, **changes: Any) -> Path:
    (folder / "rows.jsonl").write_text('{"de": "w1", "en": "w2"}\n')
    content: dict[str, Any] = {
        "name": "pairs",
        "model": {"name": "nowhere", "task": "sequence-to-sequence", "config": {"model_type": "t5"}},
        "data": {
            "train": {"path": "rows.jsonl"},
            "evaluation": {"path": "rows.jsonl"},
            "source": "de",
            "target": "en",
        },
    }
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        (
            {"evaluation": {"generate": {"num_beams": 4, "do_sample": True}}},
            "evaluation.generate.num_beams",
            "beams look",
        ),
        (
            {"evaluation": {"generate": {"temperature": 0.5}}},
            "evaluation.generate.temperature",
            "only counts when tokens",
        ),
        ({"evaluation": {"scorer": "a:b"}}, "evaluation.scorer", "write evaluation.generate: true"),
        (
            {"evaluation": {"generate": True, "scorer": "a:bleu"}},
            "evaluation.scorer",
            "bleu is measured already",
        ),
        (
            {"evaluation": {"generate": True}, "data": {"evaluation": None}},
            "evaluation.generate",
            "name data.evaluation",
        ),
        ({"data": {"packing": True}}, "data.packing", "only language models pack"),
        ({"data": {"target": "de"}}, "data.target", "is the column of data.source as well"),
        (
            {"checkpoint": {"keep_best": 1, "metric": "bleu"}},
            "checkpoint.metric",
            "measures loss, perplexity, accuracy",
        ),
    ],
)
def test_keys_that_contradict_each_other(
    changes: dict[str, Any], key: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        load(job(tmp_path, **changes))
    assert key in [problem.key for problem in caught.value.problems]


def test_a_metric_of_what_is_written_can_be_watched(tmp_path: Path) -> None:
    changes = {
        "evaluation": {"generate": True, "scorer": "a:mine"},
        "checkpoint": {"keep_best": 1, "metric": "mine"},
    }
    loaded = load(job(tmp_path, **changes))
    assert loaded.evaluation.generate == Generate()


def test_another_task_writes_nothing(tmp_path: Path) -> None:
    path = job(tmp_path, evaluation={"generate": True})
    content = yaml.safe_load(path.read_text())
    content["model"]["task"], content["data"] = (
        "sequence-classification",
        {"train": {"path": "rows.jsonl"}, "text": "de", "label": "en"},
    )
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigurationError, match="writes nothing"):
        load(path)
