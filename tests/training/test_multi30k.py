"""Real translations: a small encoder-decoder made on the spot learns 48 pairs of Multi30k by heart on two ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.distributed.data_world import SHARED
from tests.training.pairs import model_of
from tests.training.runs import batch_of, evaluations, new_run, plan_for, start

pytestmark = [pytest.mark.distributed, pytest.mark.very_slow]
DATA = SHARED / "multi30k"
STEPS = 150


def rows(number: int) -> list[dict[str, str]]:
    german, english = (
        (DATA / f"train.{code}").read_text(encoding="utf-8").splitlines()[:number] for code in ("de", "en")
    )
    return [{"de": source, "en": target} for source, target in zip(german, english, strict=True)]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level pieces, learned from these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
def test_48_pairs_are_learned_by_heart(tmp_path: Path) -> None:
    pairs = rows(48)
    tokenizer_of([text for row in pairs for text in row.values()]).save_pretrained(tmp_path / "model")
    model = model_of("t5", d_model=64, d_ff=128, vocab_size=1000, dropout_rate=0.0)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    source = {"path": str(tmp_path / "rows.jsonl")}
    data = {"train": source, "evaluation": source, "source": "de", "target": "en", "num_workers": 1}
    data |= {"max_length": 96, "max_target_length": 64}
    task = {
        "task": "sequence-to-sequence",
        "model__task": "sequence-to-sequence",
        "attention": "sdpa",
        "layout": "padded",
    }
    plan = plan_for(
        tmp_path / "model", data, 2, STEPS, batch=batch_of(2, 8), training={"learning_rate": 5e-3},
        evaluation={"generate": {"max_new_tokens": 48}}, **task,
    )  # fmt: skip
    run, began = new_run(tmp_path / "run", plan), time.monotonic()
    attempt = start(run, 2)
    attempt.join(540)
    assert attempt.errors() == [None, None]
    before, after = evaluations(run)[0], evaluations(run)[STEPS]
    print(f"{before}\n{after}\n{time.monotonic() - began:.0f} s")
    assert before["bleu"] < 5
    assert after["bleu"] >= 90 and after["chrf"] >= 90 and after["rougeL"] >= 90
