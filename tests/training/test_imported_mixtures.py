"""How many rows of each data set an epoch has: of LLaMA-Factory's ways to mix, by `datasets` itself, and of the job
that is imported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, interleave_datasets

from launcher.data.mixture import in_an_epoch
from launcher.data.section import Mixing, Sources
from launcher.importing.job import import_files

STOPS = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}
"""As LLaMA-Factory 0.9.6 calls `interleave_datasets` (src/llamafactory/data/data_utils.py)."""


def counted(sizes: list[int], strategy: str, shares: list[float] | None) -> list[int]:
    """The rows of each data set in the one that `datasets` makes of them."""
    parts = [Dataset.from_dict({"source": [number] * size}) for number, size in enumerate(sizes)]
    mixed = interleave_datasets(parts, probabilities=shares, seed=42, stopping_strategy=STOPS[strategy])
    return np.bincount(mixed["source"], minlength=len(sizes)).tolist()


def imported(folder: Path, sizes: list[int], strategy: str, shares: list[float] | None) -> list[int]:
    """The samples of each source in an epoch of the job."""
    content = {"finetuning_type": "full", "dataset": [f"d{number}" for number in range(len(sizes))]}
    content |= {"mix_strategy": strategy}
    content |= {"interleave_probs": ",".join(map(str, shares))} if shares else {}
    (folder / "a.yaml").write_text(yaml.safe_dump(content))
    data = import_files([folder / "a.yaml"]).content["data"]
    mixing = Mixing(**data["mixing"]) if "mixing" in data else None
    return in_an_epoch(sizes, Sources(sources=tuple(data["train"])), mixing)


@pytest.mark.parametrize("strategy", STOPS)
@pytest.mark.parametrize("sizes", [[7, 7], [3, 8, 5], [1, 40]])
def test_in_turn_an_epoch_has_as_many_rows_of_each(sizes: list[int], strategy: str, tmp_path: Path) -> None:
    assert imported(tmp_path, sizes, strategy, None) == counted(sizes, strategy, None)


@pytest.mark.parametrize("strategy", STOPS)
@pytest.mark.parametrize("shares", [[0.75, 0.25], [0.4, 0.6]])
def test_by_chance_an_epoch_is_as_long_but_for_chance(
    shares: list[float], strategy: str, tmp_path: Path
) -> None:
    sizes = [900, 500]
    there = counted(sizes, strategy, shares)
    # The draws that bring n rows of a data set with the chance p have a standard deviation below sqrt(n) / p.
    chance = 2 * max(sizes) ** 0.5 / min(shares)
    assert imported(tmp_path, sizes, strategy, shares) == pytest.approx(there, abs=chance)
    if strategy == "interleave_once":
        assert there == sizes
