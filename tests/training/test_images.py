"""Images to classes: what is decoded, what a model sees, and the equivalences of the text tasks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from launcher.data.rows import RowProblem
from launcher.errors import ConfigurationError, DataError
from launcher.tasks import images, media
from launcher.tasks.image_classification import ImageClassification
from launcher.tasks.image_columns import Augmentation, ImageColumns
from launcher.tasks.media import Content
from launcher.tasks.pixels import Pixels, crop_box
from launcher.tasks.task import Draws, Sample
from launcher.training.data.prepare import prepare
from launcher.training.model import normalization
from launcher.training.model.pretrained import read_processor
from tests.training.pictures import SIZE, folder_of, metadata_of, model_of, picture, plan_of

ALTERED = {
    "random_crop": 0.5, "horizontal_flip": 0.5, "color_jitter": 0.3, "rand_augment": [2, 9], "random_erasing": 0.5,
}  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("resnet"), "resnet")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("pictures"))


def task_of(model: Path, data: Path, **options: Any) -> ImageClassification:
    plan = plan_of(model, data, columns=options)
    task = ImageClassification(plan.data, ["blue", "green", "red"])
    task.prepare(read_processor(plan))
    return task


# What becomes of a file.

DAMAGED = {
    "corrupt": (b"\x89PNG\r\n\x1a\n" + b"junk" * 40, "not readable"),
    "no image": (b"a text", "not readable"),
    "empty": (b"", "empty"),
    "truncated": (encoded(picture("red", 0), "PNG")[:300], "not readable"),
    "cut JPEG": (encoded(Image.effect_noise((200, 200), 60).convert("RGB"), "JPEG")[:3000], "not readable"),
    "bomb": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "too many pixels"),
    "range unknown": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "not readable"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_decoded_says_its_file_and_why(name: str, tmp_path: Path) -> None:
    data, reason = DAMAGED[name]
    file = tmp_path / "one.png"
    file.write_bytes(data)
    with pytest.raises(RowProblem) as caught:
        images.opened(media.content(str(file)))
    assert caught.value.reason == reason
    assert caught.value.detail.startswith(f"{tmp_path.name}/one.png: ") and "\n" not in caught.value.detail


def test_every_kind_of_image_becomes_colours_of_eight_bits() -> None:
    plain = picture("red", 0)
    cmyk, _ = images.opened(Content("", encoded(plain.convert("CMYK"), "TIFF")))
    assert np.abs(np.asarray(cmyk, int) - np.asarray(plain, int)).max() <= 2
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    wide, _ = images.opened(Content("", encoded(Image.fromarray(ramp), "PNG")))
    assert (np.asarray(wide)[..., 0] == ramp >> 8).all(), "Pillow's own conversion cuts off above 255"
    for mode in ("L", "LA", "P", "RGBA", "1"):
        image, frames = images.opened(Content("", encoded(plain.convert(mode), "PNG")))
        assert (image.mode, frames) == ("RGB", 1)


def test_an_image_is_turned_as_its_camera_says() -> None:
    plain = Image.new("RGB", (8, 4), "white")
    plain.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image, _ = images.opened(Content("", encoded(plain, "PNG", exif=exif)))
    assert image.size == (4, 8) and image.getpixel((3, 0)) == (255, 0, 0)


def test_an_animation_is_its_first_frame_or_no_sample(vit: Path, pictures: Path) -> None:
    frames = [picture(name, 0).quantize(16) for name in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    row = {"image": data, "label": "red"}
    [cut] = task_of(vit, pictures).encode([row], None)
    assert not isinstance(cut, RowProblem) and cut.cut == "the first of 2 frames"
    [dropped] = task_of(vit, pictures, too_long="drop").encode([row], None)
    assert isinstance(dropped, RowProblem) and str(dropped) == "too long: 2 frames"


# What the rows of a source are.


def test_folders_tables_and_bytes_hold_the_same_samples(vit: Path, cache: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    plain, named = folder_of(cache / "plain", 4), metadata_of(folder_of(cache / "named", 4))
    (named / "metadata.jsonl").rename(cache / "rows.jsonl")
    text = (cache / "rows.jsonl").read_text().replace('"file_name": "', '"file_name": "named/')
    (cache / "rows.jsonl").write_text(text)
    rows = [json.loads(line) for line in text.splitlines()]
    structs = [{"bytes": (cache / row["file_name"]).read_bytes(), "path": None} for row in rows]
    parquet.write_table(
        pa.table({"image": structs, "label": [row["label"] for row in rows]}), cache / "rows.parquet"
    )
    batches = []
    for source in (plain, cache / "rows.jsonl", cache / "rows.parquet"):
        plan = plan_of(vit, source)
        task = ImageClassification(plan.data)
        dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
        assert dataset.report.rows_used == 12 and task.labels == ["blue", "green", "red"]
        batches.append(task.collate([dataset.item(number) for number in range(12)]))
    for batch in batches[1:]:
        assert torch.equal(batch["pixel_values"], batches[0]["pixel_values"])
        assert torch.equal(batch["labels"], batches[0]["labels"])


def test_bad_files_are_counted_and_the_rest_keeps_its_order(vit: Path, cache: Path) -> None:
    good = folder_of(cache / "good", 3)
    bad = folder_of(cache / "bad", 3)
    (bad / "blue" / "0000a.png").write_bytes(b"no image")
    (bad / "green" / "notes.txt").write_text("notes")
    orders = []
    for folder in (good, bad):
        plan = plan_of(vit, folder)
        task = ImageClassification(plan.data)
        dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
        orders.append([media.stored_content(dataset.item(number)[0]).data for number in range(9)])
    assert orders[0] == orders[1]
    assert dataset.report.dropped == {"not readable": 2}
    details = [one["detail"] for one in dataset.report.examples]
    assert details[0] == "blue/0000a.png: not an image that Pillow reads"
    assert details[1].startswith("green/notes.txt: its name ends like none of .bmp")
    plan = plan_of(vit, bad, columns={"unusable": "refuse"})
    with pytest.raises(DataError, match=r"blue/0000a\.png: not an image"):
        prepare(plan.data.train, "train", plan, ImageClassification(plan.data), read_processor(plan))


def test_a_file_that_changes_is_prepared_anew_or_stops_the_run(vit: Path, cache: Path) -> None:
    folder = folder_of(cache / "folder", 2)
    plan = plan_of(vit, folder)
    task = ImageClassification(plan.data)
    before = prepare(plan.data.train, "train", plan, task, read_processor(plan))
    picture("red", 77).save(folder / "red" / "0000.png")
    with pytest.raises(DataError, match=r"red/0000\.png changed since the data was prepared"):
        task.collate([before.item(number) for number in range(6)])
    again = prepare(plan.data.train, "train", plan, task, read_processor(plan))
    assert not again.report.cached and again.report.samples_hash != before.report.samples_hash
    task.collate([again.item(number) for number in range(6)])
    (folder / "red" / "0000.png").unlink()
    with pytest.raises(DataError, match="was read when the data was prepared, and is not now"):
        task.collate([again.item(number) for number in range(6)])


# What a model sees.


def test_pixels_are_those_of_the_models_own_processor(vit: Path, resnet: Path) -> None:
    for model in (vit, resnet):
        processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        image = picture("green", 3)
        own = processor(image, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(Pixels.of(processor, None).of_image(image), own)
        for _ in range(2):  # to set a size again changes nothing
            sized = Pixels.of(processor, 24)
        assert (sized.height, sized.width) == (24, 24)


def test_a_processor_without_one_size_is_refused(vit: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    processor.do_resize = False
    with pytest.raises(ConfigurationError, match=r"the same of all; data\.image_size sets one size"):
        Pixels.of(processor, None)


def test_a_model_that_sees_one_channel_is_refused(vit: Path, pictures: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(vit, num_channels=1)
    with pytest.raises(ConfigurationError, match="the model sees 1 channels"):
        task_of(vit, pictures).adopt(config)


def test_alterations_hang_on_seed_step_and_sample_alone(vit: Path, pictures: Path) -> None:
    task = task_of(vit, pictures, augmentation=ALTERED)
    content = media.content(str(pictures / "red" / "0000.png"))
    arrays = media.stored(str(pictures / "red" / "0000.png"), content) | {"label": np.array([2])}
    first, second = (Sample(arrays, number, 1) for number in (5, 6))
    draws = Draws(3, 7, training=True)
    torch.manual_seed(1)
    alone = task.collate([[second]], draws)["pixel_values"][0]
    state_before = torch.random.get_rng_state()
    beside = task.collate([[first], [second]], draws)["pixel_values"]
    assert torch.equal(torch.random.get_rng_state(), state_before)
    assert torch.equal(beside[1], alone) and not torch.equal(beside[0], alone)
    later = task.collate([[second]], Draws(3, 8, training=True))["pixel_values"][0]
    assert not torch.equal(later, alone)
    plain = task.collate([[second]], Draws(3, 7))["pixel_values"][0]
    assert torch.equal(plain, task.collate([[second]])["pixel_values"][0]) and not torch.equal(plain, alone)


@pytest.mark.parametrize("name", ALTERED)
def test_each_alteration_changes_an_image_within_its_range(name: str, vit: Path) -> None:
    pixels = Pixels.of(AutoImageProcessor.from_pretrained(vit, backend="pil"), None)
    image = picture("blue", 1)
    how = Augmentation.model_validate({name: 1.0 if name == "horizontal_flip" else ALTERED[name]})
    several = [pixels.altered(image, how, np.random.default_rng(number)) for number in range(8)]
    assert any(not np.allclose(one, pixels.of_image(image), atol=1e-3) for one in several)
    assert all(one.shape == (3, SIZE, SIZE) and np.abs(one).max() <= 1.0 + 1e-6 for one in several)
    if name == "horizontal_flip":
        assert np.allclose(several[0], pixels.of_image(image)[..., ::-1], atol=1e-5)


PROCESSORS = sorted(
    {
        named["pil"]
        for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if "pil" in (named := IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or {})
    }
    - {"Siglip2ImageProcessorPil", "TimmWrapperImageProcessor"}  # of models that are refused
)


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_that_nothing_is_altered_of_is_the_processors_own(name: str) -> None:
    """MobileViT's turns the channels round, EfficientNet's divides by the deviation twice: each once alone."""
    try:
        pixels = Pixels.of(getattr(transformers, name)(), 32 if name != "DonutImageProcessorPil" else None)
    except ConfigurationError:
        return  # no tensor of one size: refused as it is
    pixels.check_altered()
    image = picture("green", 3).resize((70, 60))
    altered = pixels.altered(image, Augmentation(), np.random.default_rng(0))
    assert np.allclose(altered, pixels.of_image(image), atol=1e-4)


def test_a_processor_that_does_more_than_is_known_takes_no_alterations(
    vit: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_of(vit, pictures, augmentation={"horizontal_flip": 0.5})
    own = transformers.ViTImageProcessorPil.__call__

    def inverted(self: Any, images: Any, **options: Any) -> Any:
        given = own(self, images, **options)
        return given | {"pixel_values": -given["pixel_values"]}

    monkeypatch.setattr(transformers.ViTImageProcessorPil, "__call__", inverted)
    task_of(vit, pictures)
    with pytest.raises(ConfigurationError, match=r"data\.augmentation.*ViTImageProcessorPil does more"):
        task_of(vit, pictures, augmentation={"horizontal_flip": 0.5})


def test_a_random_crop_keeps_its_share_of_the_image() -> None:
    draws = np.random.default_rng(0)
    boxes = [crop_box((64, 48), 0.25, draws) for _ in range(200)]
    shares = [(right - left) * (lower - upper) / (64 * 48) for left, upper, right, lower in boxes]
    assert 0.2 < min(shares) < 0.4 and 0.8 < max(shares) <= 1
    assert all(0 <= left < right <= 64 and 0 <= upper < lower <= 48 for left, upper, right, lower in boxes)


def test_the_loss_is_that_of_transformers_own_class(vit: Path, resnet: Path, pictures: Path) -> None:
    for name, size in ((vit, None), (vit, 32), (resnet, None)):
        task = task_of(name, pictures, image_size=size)
        model = AutoModelForImageClassification.from_pretrained(
            name, num_labels=3, ignore_mismatched_sizes=True
        ).eval()
        task.seeing.own_size = (SIZE, SIZE) if name == vit else None
        rows = [{"image": str(pictures / one / "0001.png"), "label": one} for one in ("blue", "green", "red")]
        samples = [Sample(one.arrays, number, 1) for number, one in enumerate(task.encode(rows, None))]  # type: ignore[union-attr]
        batch = task.collate([[sample] for sample in samples])
        assert ("interpolate_pos_encoding" in batch) == (size is not None)
        own = model(**{key: value for key, value in batch.items() if key != "weights"}).loss
        assert torch.isclose(task.loss(model, batch).loss_sum / 3, own, rtol=1e-6)


def test_what_a_row_must_have_for_an_image() -> None:
    columns = ImageColumns.model_validate({"train": {"path": "images"}}).file_columns
    for row, reason in (
        ({"label": "red"}, "missing key: no 'image'"),
        ({"image": None}, "missing key: 'image' is null"),
        ({"image": " "}, "empty: 'image' names no file"),
        ({"image": 3}, "value that cannot be used: 'image' is a int, not a path or bytes"),
    ):
        with pytest.raises(RowProblem) as caught:
            media.named(row, columns)
        assert str(caught.value).startswith(reason)
    with pytest.raises(RowProblem, match=r"there/no\.png: no such file"):
        media.content("not/there/no.png")


def test_a_model_without_a_processor_gets_that_of_its_kind(tmp_path: Path, pictures: Path) -> None:
    model = model_of(tmp_path / "vit")
    (model / "preprocessor_config.json").unlink()
    processor = read_processor(plan_of(model, pictures))
    assert dict(processor.size)["height"] == SIZE
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(model)
    with pytest.raises(ConfigurationError, match="a llama model has none of its own"):
        read_processor(plan_of(model, pictures))


def test_a_model_without_normalization_cannot_have_it_frozen() -> None:
    with pytest.raises(
        ConfigurationError, match=r"freeze_normalization.*org/model has no layers that normalise"
    ):
        normalization.freeze(torch.nn.Sequential(torch.nn.Linear(2, 2)), "org/model")


def test_layers_that_are_computed_again_count_their_samples_once() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    plain, again = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2))
    again.load_state_dict(plain.state_dict())
    normalization.share_statistics(again, frozen=False)
    hidden = torch.randn(5, 3, 6, 6)
    plain(hidden).square().sum().backward()
    checkpoint(again, hidden, use_reentrant=False).square().sum().backward()
    for (name, own), other in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(own, other), name
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
