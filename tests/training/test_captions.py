"""Images to text: what becomes of a row, and that the numbers are transformers' own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    Pix2StructConfig,
    VisionEncoderDecoderModel,
)

from launcher.data.rows import RowProblem
from launcher.errors import ConfigurationError, DataError
from launcher.tasks.generation import Evaluation, Generate
from launcher.tasks.image_to_text import ImageToText
from launcher.tasks.task import KEEPS_LOSSES, Draws, Sample
from launcher.training import generating
from launcher.training.by_source import losses_of_samples
from launcher.training.data.cache_key import tokenizer_digest
from launcher.training.data.prepare import prepare
from launcher.training.inputs import refuse_tokens
from launcher.training.model.pretrained import read_config, read_processor
from launcher.training.tracing.make_profile import make_profile
from tests.distributed.test_data_inspect import inspected, learned
from tests.families.captions import POSITIONS
from tests.training.captions import (
    BEGIN,
    END,
    PAD,
    folder_of,
    model_of,
    plan_of,
    rows_of,
    text_of,
    tokenizer_of,
)
from tests.training.pictures import SIZE

KINDS = ("gpt2", "bert", "trocr", "swin", "donut-swin")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what is unlike ViT with GPT-2; that has a tokenizer that writes no ends, as GPT-2's own."""
    return {
        part: model_of(tmp_path_factory.mktemp(part), f"vision-encoder-decoder+{part}", ends=part != "gpt2")
        for part in KINDS
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("pictures"), 6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def task_of(model: Path, data: Path, **options: Any) -> ImageToText:
    plan = plan_of(model, data, columns=options)
    task = ImageToText(plan.data)
    task.prepare(read_processor(plan))
    task.adopt(read_config(plan))
    return task


def samples_of(task: ImageToText, folder: Path) -> list[Sample]:
    samples = []
    for number, one in enumerate(task.encode(rows_of(folder), None)):
        assert not isinstance(one, RowProblem), one
        samples.append(Sample(one.arrays, number, 1))
    return samples


def one_of(task: ImageToText, folder: Path, **row: Any) -> Any:
    [one] = task.encode([rows_of(folder)[0] | row], None)
    return one


# The loss.


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose text stands beside the image; BLIP's own loss is smoothed."""
    return {kind: model_of(tmp_path_factory.mktemp(kind), kind) for kind in ("blip", "git")}


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_a_text_beside_its_image_has_the_loss_and_gradient_of_its_own_class(
    kind: str, beside: dict[str, Path], folder: Path
) -> None:
    """By the processors' own calls, begun as the class's own `generate` begins; filler counts nothing."""
    task = task_of(beside[kind], folder)
    model = AutoModelForImageTextToText.from_pretrained(beside[kind], attn_implementation="eager").eval()
    images = AutoImageProcessor.from_pretrained(beside[kind], backend="pil")
    tokenizer, own, weights = AutoTokenizer.from_pretrained(beside[kind]), [], list(model.parameters())
    samples = samples_of(task, folder)
    for row in rows_of(folder):
        ids = torch.tensor([[BEGIN, *tokenizer(row["text"], add_special_tokens=False)["input_ids"], END]])
        pixels = images(Image.open(row["file_name"]), return_tensors="pt")["pixel_values"]
        own.append(model(pixel_values=pixels, input_ids=ids, labels=ids).loss * (ids.shape[1] - 1))
    batch = task.collate([[one] for one in (*samples, samples[0].as_filler())])
    loss_sum = task.loss(model, batch).loss_sum
    torch.testing.assert_close(loss_sum, sum(own), rtol=1e-5, atol=1e-5)
    pairs = zip(
        *(torch.autograd.grad(one, weights, allow_unused=True) for one in (loss_sum, sum(own))), strict=True
    )
    assert all(one is other or torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("kind", ["blip", "git"])
def test_a_text_beside_its_image_is_written_as_its_own_generate_does(
    kind: str, num_beams: int, beside: dict[str, Path], folder: Path
) -> None:
    task = task_of(beside[kind], folder)
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=6, num_beams=num_beams))
    model = AutoModelForImageTextToText.from_pretrained(beside[kind]).eval()
    prompts = task.prompts(samples_of(task, folder))
    task.configure_generation(model.generation_config)
    own = model.generate(pixel_values=prompts["pixel_values"], max_new_tokens=6, num_beams=num_beams)
    model.forward = functools.partial(task.loss, model)
    written = generating.generate(model, prompts, task.generation, lambda: False, synced=False)
    assert written.tolist() == own[:, 1:].tolist() and len(set(written.flatten().tolist())) > 2
    assert model.main_input_name == type(model).main_input_name


def test_a_model_that_does_not_say_how_its_texts_begin_is_refused(
    beside: dict[str, Path], folder: Path
) -> None:
    task = task_of(beside["git"], folder)
    config = read_config(plan_of(beside["git"], folder))
    config.bos_token_id = None
    with pytest.raises(ConfigurationError, match="its config has no bos_token_id"):
        task.adopt(config)
    with pytest.raises(
        ConfigurationError, match=r"data\.image_size = 24: a git model looks for its text behind"
    ):
        task_of(beside["git"], folder, image_size=24)
    stretched = task_of(beside["blip"], folder, image_size=24)
    assert stretched.plain_batch(samples_of(stretched, folder)[0])["interpolate_pos_encoding"]  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_transformers_own_class_for_each_text(
    kind: str, models: dict[str, Path], folder: Path
) -> None:
    """By the processors' own calls, of texts of several lengths; filler counts nothing."""
    task = task_of(models[kind], folder)
    model = VisionEncoderDecoderModel.from_pretrained(models[kind], attn_implementation="eager").eval()
    images = AutoImageProcessor.from_pretrained(models[kind], backend="pil")
    tokenizer, own, num_tokens = AutoTokenizer.from_pretrained(models[kind]), [], []
    samples = samples_of(task, folder)
    for number, row in enumerate(rows_of(folder)):
        ids = tokenizer(row["text"])["input_ids"] + ([END] if kind == "gpt2" else [])
        pixels = images(Image.open(row["file_name"]), return_tensors="pt")["pixel_values"]
        own.append(float(model(pixel_values=pixels, labels=torch.tensor([ids])).loss.detach()) * len(ids))
        num_tokens.append(len(ids))
        assert samples[number]["labels"].tolist() == ids
    assert len(set(num_tokens)) > 1
    batch = task.collate([[one] for one in (*samples, samples[0].as_filler())])
    assert int((batch["targets"] != -100).sum()) == sum(num_tokens)
    output = task.loss(model, batch | {KEEPS_LOSSES: True})
    assert float(output.loss_sum.detach()) == pytest.approx(sum(own), rel=1e-5)
    each = losses_of_samples(output, batch, [*samples, samples[0].as_filler()])
    assert each.tolist() == pytest.approx([*own, 0.0], rel=1e-5)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_it_writes_what_its_own_generate_does(
    kind: str, num_beams: int, models: dict[str, Path], folder: Path
) -> None:
    """Its generation config, as in an export, is all that a plain call needs."""
    task = task_of(models[kind], folder)
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=6, num_beams=num_beams))
    model = VisionEncoderDecoderModel.from_pretrained(models[kind]).eval()
    prompts = task.prompts(samples_of(task, folder))
    generation = GenerationConfig()
    task.configure_generation(generation)
    generation.max_new_tokens, generation.num_beams = 6, num_beams
    own = model.generate(prompts["pixel_values"], generation_config=generation)
    model.forward = functools.partial(task.loss, model)
    written = generating.generate(model, prompts, task.generation, lambda: False, synced=False)
    assert written.tolist() == own[:, 1:].tolist() and len(set(written.flatten().tolist())) > 2


def test_images_of_another_size_have_their_positions_stretched(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["bert"], folder, image_size=24)
    model = VisionEncoderDecoderModel.from_pretrained(models["bert"]).eval()
    [sample, *_] = samples_of(task, folder)
    plain = task.plain_batch(sample)
    assert plain is not None and plain["interpolate_pos_encoding"] and plain["pixel_values"].shape[-1] == 24
    with torch.no_grad():
        loss = model(**plain).loss * len(sample["labels"])
        ours = task.loss(model, task.collate([[sample]])).loss_sum
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    model.forward = functools.partial(task.loss, model)
    short = task.generation.also(max_new_tokens=2)
    assert generating.generate(model, task.prompts([sample]), short, lambda: False, synced=False).numel()


def test_images_are_altered_in_training_alone(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["bert"], folder, augmentation={"color_jitter": 0.3})
    samples = [[one] for one in samples_of(task, folder)]
    plain, measured, trained = (
        task.collate(samples, draws)["pixel_values"]
        for draws in (None, Draws(1, 2), Draws(1, 2, training=True))
    )
    assert torch.equal(plain, measured) and not torch.equal(plain, trained)


# What becomes of a row.


def test_bytes_in_a_table_are_the_same_samples(models: dict[str, Path], folder: Path, cache: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = rows_of(folder)
    structs = [{"bytes": Path(row["file_name"]).read_bytes(), "path": None} for row in rows]
    table = pa.table({"image": structs, "text": [row["text"] for row in rows]})
    parquet.write_table(table, cache / "rows.parquet")
    lines = [f"{row['file_name']},{row['text']}\n" for row in rows]
    (cache / "rows.csv").write_text("file_name,text\n" + "".join(lines))
    batches = []
    for source in (folder, cache / "rows.parquet", cache / "rows.csv"):
        plan = plan_of(models["bert"], source)
        task = task_of(models["bert"], source)
        dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
        assert dataset.report.rows_used == 6
        batches.append(task.collate([dataset.item(number) for number in range(6)]))
    for batch in batches[1:]:
        assert torch.equal(batch["pixel_values"], batches[0]["pixel_values"])
        assert torch.equal(batch["labels"], batches[0]["labels"])


def test_a_look_at_the_data_shows_images_with_their_texts(
    models: dict[str, Path], folder: Path, cache: Path
) -> None:
    [sample, *_] = inspected(plan_of(models["bert"], folder), cache)["samples"]
    assert sample["path"] == str(folder / "0000.png") and sample["num_learned"] == sample["num_tokens"]
    assert f"<s> {text_of(0)} </s>" == "".join(text for text, is_learned in learned(sample) if is_learned)


def test_long_texts_are_cut_with_their_end_or_dropped(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["gpt2"], folder, max_target_length=8)
    cut = one_of(task, folder, text="red " * 20)
    assert cut.arrays["labels"].tolist() == [6] * 7 + [END] and cut.cut == "21 tokens, above 8"
    dropped = one_of(task_of(models["gpt2"], folder, too_long="drop"), folder, text="red " * 40)
    assert str(dropped) == f"too long: {folder.name}/0000.png: 41 tokens, above {POSITIONS}"


def test_positions_behind_the_padding_token_hold_no_text(folder: Path, tmp_path: Path) -> None:
    roberta = model_of(tmp_path, "vision-encoder-decoder+roberta")
    assert task_of(roberta, folder)._most_tokens == POSITIONS - PAD - 1
    task = task_of(roberta, folder, max_target_length=8)
    task.evaluation = Evaluation(generate=Generate(max_new_tokens=100))
    assert task.generation.arguments["max_new_tokens"] == 8


def test_rows_without_what_they_need(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["bert"], folder, references="more")
    assert str(one_of(task, folder, text=" ")).startswith("empty")
    assert str(one_of(task, folder, file_name="none.png")) == "missing key: none.png: no such file"
    assert str(one_of(task, folder, more=[3])).startswith("value that cannot be used: 'more' is not a list")
    task.for_prediction = True
    [row] = [{"file_name": rows_of(folder)[0]["file_name"]}]
    assert task.texts(row) == [] and not isinstance(task.encode([row], None)[0], RowProblem)
    assert task.answer(row, [{"text": "a"}]) == {"image": row["file_name"], "text": "a"}


def test_several_references_count_by_the_best(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["bert"], folder, references="more")
    task.evaluation = Evaluation(generate=Generate())
    one = one_of(task, folder, more=["a b", "red"])
    batch = task.collate([[Sample(one.arrays, 0, 1)]])
    assert batch["aside"]["references"] == [["a b", "red"]]
    assert {"rougeL", "exact_match", "perplexity"} <= set(task.metrics)


# What a model must say.


def test_what_a_config_does_not_say_of_its_decoder_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    model = model_of(tmp_path, decoder_start_token_id=None, pad_token_id=None)
    reason = (
        r"its config has no decoder_start_token_id, the token that its decoder starts from; write it into its "
        r"config\.json, as 1, its bos_token"
    )
    with pytest.raises(ConfigurationError, match=reason):
        task_of(model, folder)
    config = task_of(model_of(tmp_path / "told", pad_token_id=None), folder)._config
    assert (config.decoder_start_token_id, config.pad_token_id) == (BEGIN, PAD), "the decoder's own"


def test_a_decoder_that_reads_no_encoder_is_refused(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["bert"], folder)
    config = read_config(plan_of(models["bert"], folder))
    config.decoder = LlamaConfig(num_hidden_layers=1)
    with pytest.raises(ConfigurationError, match="its decoder, a llama model, reads no encoder's output"):
        task.adopt(config)


def test_a_model_of_another_make_is_refused(models: dict[str, Path], folder: Path) -> None:
    task = task_of(models["bert"], folder)
    with pytest.raises(
        ConfigurationError, match="a pix2struct model is no vision-encoder-decoder, as TrOCR, Donut"
    ):
        task.adopt(Pix2StructConfig())
    with pytest.raises(ValueError, match="and a llama model has none of its own"):
        task.usual_processor(LlamaConfig())


def test_a_tokenizer_without_an_end_is_refused(folder: Path, tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer_of(eos_token=None).save_pretrained(model)
    with pytest.raises(ConfigurationError, match=r"no end of text \(eos_token or sep_token\)"):
        task_of(model, folder)


def test_a_text_with_its_end_before_a_code_gets_no_second_end(
    models: dict[str, Path], folder: Path, cache: Path
) -> None:
    """As mBART's tokenizer writes it."""
    task = task_of(models["bert"], folder, max_target_length=8)
    processor = read_processor(plan_of(models["bert"], folder))
    backend, named = processor.tokenizer.backend_tokenizer, [("</s>", END), ("<s>", BEGIN)]
    backend.post_processor = processors.TemplateProcessing(single="$A </s> <s>", special_tokens=named)
    task.prepare(processor)
    assert one_of(task, folder, text="red red").arrays["labels"].tolist() == [6, 6, END, BEGIN]
    long = one_of(task, folder, text="red " * 20)
    assert long.cut and long.arrays["labels"].tolist() == [6] * 6 + [END, BEGIN]


def test_a_token_without_a_row_is_refused(models: dict[str, Path], folder: Path, cache: Path) -> None:
    plan = plan_of(models["bert"], folder)
    task, processor = task_of(models["bert"], folder), read_processor(plan)
    dataset = prepare(plan.data.train, "train", plan, task, processor)
    config = read_config(plan)
    refuse_tokens(dataset, "data.train", processor.tokenizer, config)
    config.decoder.vocab_size = 6
    with pytest.raises(
        ConfigurationError, match=r"data\.train: has the token 'red' \(6\), and the embedding"
    ):
        refuse_tokens(dataset, "data.train", processor.tokenizer, config)


def test_the_usual_image_processor_is_the_encoders(folder: Path, tmp_path: Path) -> None:
    model = model_of(tmp_path)
    (model / "preprocessor_config.json").unlink()
    processor = read_processor(plan_of(model, folder))
    assert dict(processor.images.size)["height"] == SIZE and processor.tokenizer.eos_token_id == END
    before = tokenizer_digest(processor)
    processor.tokenizer = tokenizer_of(ends=False)
    assert tokenizer_digest(processor) != before, "another tokenizer makes other samples"


def test_a_file_that_changes_stops_the_run(models: dict[str, Path], cache: Path) -> None:
    folder = folder_of(cache / "folder", 2)
    task = task_of(models["bert"], folder)
    samples = samples_of(task, folder)
    (folder / "0001.png").write_bytes((folder / "0000.png").read_bytes())
    with pytest.raises(DataError, match=r"0001\.png changed since the data was prepared"):
        task.collate([[one] for one in samples])


# The planner.


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["gpt2", *(pytest.param(kind, marks=pytest.mark.very_slow) for kind in ("trocr", "swin", "blip", "git"))],
)
def test_a_profile_is_made_of_the_longest_text(
    kind: str, models: dict[str, Path], beside: dict[str, Path], folder: Path
) -> None:
    profile = make_profile(plan_of((models | beside)[kind], folder, precision="fp32"))
    assert not profile.untraceable and len(profile.layers) >= 4
    assert set(profile.passes) >= {"none", "full", "evaluation"}
    assert text_of(0) and np.isfinite(profile.quadratic)
