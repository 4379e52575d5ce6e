"""What the tests of whole runs share: one model and one set of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import causal_data, model_directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with its tokenizer."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return model_directory(tmp_path_factory.mktemp("model"), **small, head_dim=16)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """200 rows of 2 to 60 words, packed into 64, and 24 held out."""
    return causal_data(tmp_path_factory.mktemp("data"))
