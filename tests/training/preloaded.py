"""Do once what every rank of a test would do: the process that ranks are forked from imports this.

DeepSpeed's imports, with the compiler that one of its optimizers decorates a function with, take a rank two
seconds of processor time. transformers' table of renamed parameters, made at the first loading, takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import importlib
import os

from transformers import conversion_mapping

os.environ.setdefault(
    "DS_ACCELERATOR", "cpu"
)  # DeepSpeed asks for it while it is imported; the ranks have no other

for _name in (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "launcher.training.attempt",
    "launcher.tasks.causal_lm",
    "launcher.tasks.sequence_classification",
    "pytest",
    "tests.distributed.checkpoint_world",
    "tests.training.runs",
):
    importlib.import_module(_name)
with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
conversion_mapping.get_checkpoint_conversion_mapping("llama")
