"""Small tokenizers, plans and files for the tests of the data and the tasks; nothing here needs a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from launcher.data.section import Data, Source
from launcher.job.schema import Checkpoint, Model, Training
from launcher.planner.plan import BatchPlan, Length, Mesh, Plan

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
LINES = [
    "the cat sat on the mat .",
    "a dog ran in the park ?",
    "one two three four five six seven",
    "question answer user assistant system",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + "
    "'<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def byte_tokenizer(template: str | None = CHATML, bos: bool = False) -> Any:
    """A byte-level BPE over a few lines, with ChatML's special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            vocab_size=400,
            show_progress=False,
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    from tokenizers import decoders

    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<s>" if bos else None,
        chat_template=template,
    )


def word_tokenizer(padding_side: str = "right") -> Any:
    """One token a word, [CLS] and [SEP] and the types of BERT."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        LINES,
        trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False),
    )
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", backend.token_to_id("[SEP]")), ("[CLS]", backend.token_to_id("[CLS]"))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def plan_of(
    data: Data, task: str = "causal-lm", batch: BatchPlan | None = None, num_workers: int = 1
) -> Plan:
    """A plan on the CPU around `data`."""
    batch = batch or batch_of(1, 1, 1)
    mesh = Mesh(
        nodes=1,
        ranks_per_node=batch.data_parallel_size,
        world_size=batch.data_parallel_size,
        dp_replicate=1,
        dp_shard=batch.data_parallel_size,
        reshard_after_forward=True,
        device="cpu",
        threads_per_rank=1,
    )
    return Plan(
        name="test",
        task=task,
        engine="fsdp",
        sharding="full",
        precision="fp32",
        activation_checkpointing="none",
        attention="sdpa",
        num_data_workers=num_workers,
        trackers=(),
        grace_seconds=30,
        length=Length(value=1, unit="epochs"),
        batch=batch,
        mesh=mesh,
        model=Model(name="tiny", task=task),
        data=data,
        training=Training(),
        checkpoint=Checkpoint(),
    )


def batch_of(micro: int, accumulation: int, ranks: int, balanced: bool = False) -> BatchPlan:
    return BatchPlan(
        global_batch_size=micro * accumulation * ranks,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        data_parallel_size=ranks,
        balanced=balanced,
    )


def jsonl(path: Path, rows: list[Any]) -> Source:
    """Write rows, one JSON object a line; text and bytes are written as they are."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return Source(path=str(path))
