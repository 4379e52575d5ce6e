"""The data sets of a LLaMA-Factory file, and how several are mixed.

Read from version 0.9.6 (src/llamafactory/data). Data sets are concatenated, or interleaved by
`interleave_datasets` of `datasets`: before packing, and with the same rows in every epoch.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import Any

from launcher.importing import dataset_info, lora, mixture
from launcher.importing.mixture import DataSet
from launcher.importing.reading import Reading, as_number

READ = {"dataset", "eval_dataset", "dataset_dir", "max_samples", "mix_strategy", "interleave_probs"}
_STRATEGIES = ("concat", "interleave_under", "interleave_over", "interleave_once")
"""The last three stop at `first_exhausted`, `all_exhausted` and `all_exhausted_without_replacement`."""
_DRAWN = _STRATEGIES[1:3]
"""The strategies that leave out or repeat rows."""


def read(content: dict[str, Any], stage: str, reading: Reading) -> None:
    """Record the data sets of both roles. Must be called after it is known whether samples are packed."""
    limit = reading.count(content, "max_samples")
    given: dict[str, list[DataSet]] = {}
    for option in ("dataset", "eval_dataset"):
        names = list(dict.fromkeys(lora.words_of(content.get(option))))
        weights: dict[str, float] = {}
        if len(names) > 1 and option == "dataset":
            weights = _weights(content, names, reading)
        elif len(names) > 1:
            _measured_together(content, names, reading)
        names = [name for name in names if weights.get(name) != 0]
        data_sets = _data_sets(content, names, stage, option, reading)
        given[option] = []
        for name, one in zip(names, data_sets, strict=True):
            least = [number for number in (limit, one.place.get("limit")) if number is not None]
            more = {"limit": min(least, default=None), "weight": weights.get(name)}
            more = {key: value for key, value in more.items() if value is not None}
            given[option].append(replace(one, place=one.place | more))
    if limit is not None and not given["dataset"]:
        reading.record("data.train.limit", limit, "max_samples")
    mixture.record(given["dataset"], given["eval_dataset"], reading)


def _data_sets(
    content: dict[str, Any], names: list[str], stage: str, option: str, reading: Reading
) -> list[DataSet]:
    """Return data sets by their names: from dataset_info.json, or from the hub with `dataset_dir: ONLINE`.
    If there are several, a missing one gets a placeholder."""
    directory = content.get("dataset_dir") or "data"
    if directory == "ONLINE":
        return [DataSet({"name": name}, option) for name in names]
    info = dataset_info.table(directory, reading.source) if names and isinstance(directory, str) else {}
    data_sets, missing = [], []
    for name in names:
        alias = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._") or "source"
        called = {"alias": alias} if len(names) > 1 else {}
        one = None
        if name in info:
            one = dataset_info.data_set(name, info[name], str(directory), stage, option, reading)
        if one is None:
            missing.append(name)
            one = DataSet({"path": f"FILL-IN-{alias}.jsonl"} if called else {}, option)
        data_sets.append(replace(one, place=one.place | called))
    if missing:
        text = (
            "entries of LLaMA-Factory's dataset_info.json, which is not here, or has no file of them: write the "
            "file, or the data set on the hub, and its columns"
        )
        reading.fill_in(option, ", ".join(missing), text)
    return data_sets


def _weights(content: dict[str, Any], names: list[str], reading: Reading) -> dict[str, float]:
    """Record how several data sets are mixed; return the weight of each (0 if it is not used as a source),
    or no weights if every row comes once."""
    strategy = reading.word(content, "mix_strategy") or "concat"
    words = lora.words_of(content.get("interleave_probs"))
    shown, shares = ", ".join(words), [as_number(word) for word in words]
    if strategy not in _STRATEGIES:
        near = difflib.get_close_matches(strategy, _STRATEGIES, n=1, cutoff=0.0)[0]
        reason = f"write one of {', '.join(_STRATEGIES)}; the nearest is {near}"
        reading.refuse("mix_strategy", strategy, reason)
    elif shares and strategy == "concat":
        reason = (
            "counts where mix_strategy is interleave_under or interleave_over, and it is concat; leave it out"
        )
        reading.refuse("interleave_probs", shown, reason)
    elif shares and (
        len(shares) != len(names) or not all(one is not None and 0 <= one <= 1 for one in shares)
    ):
        reason = f"write {len(names)} numbers from 0 to 1, one for each data set of {', '.join(names)}"
        reading.refuse("interleave_probs", shown, reason)
    elif strategy == "interleave_once":
        text = "every row comes once, in whatever order data sets are drawn; launcher shuffles all rows"
        keys = "mix_strategy, interleave_probs" if shares else "mix_strategy"
        reading.ignore(keys, f"{strategy}, {shown}" if shares else strategy, text)
    elif strategy in _DRAWN:
        given = shares or [1.0] * len(names)
        weights = {name: share for name, share in zip(names, given, strict=True) if share is not None}
        never = [name for name, share in weights.items() if share == 0]
        if never:
            reading.ignore("interleave_probs", shown, f"never drawn, so no source: {', '.join(never)}")
        if len(never) + 1 >= len(names):
            return dict.fromkeys(never, 0.0)
        _say_drawn(strategy, shown, bool(reading.value_of("data.packing")), reading)
        return weights
    return {}


def _say_drawn(strategy: str, shown: str, packs: bool, reading: Reading) -> None:
    """Remark on when an epoch ends, and on how launcher's sampling differs."""
    if strategy == "interleave_over":
        reading.record("data.mixing.stopping_strategy", "all_exhausted", "mix_strategy")
        text = (
            "which rows come again is the same in every epoch there; launcher goes through each source in turn, "
            "over epochs too. An epoch is as long, but for chance"
        )
        reading.change("mix_strategy", strategy, text)
    else:
        text = (
            "rows behind the end of an epoch are never learned there; launcher goes on with them in the next "
            "epoch. An epoch is as long, but for chance"
        )
        reading.cannot_say("mix_strategy", strategy, text)
    if shown:
        text = "the chance of each row there; weights here are shares, which every epoch has exactly"
        reading.change("interleave_probs", shown, text)
    if packs:
        text = "shares of rows there, before they are packed; weights here are shares of packs"
        reading.cannot_say("mix_strategy, packing", f"{strategy}, True", text)


def _measured_together(content: dict[str, Any], names: list[str], reading: Reading) -> None:
    """Remark on held-out rows that are sampled, so that some are left out or evaluated twice."""
    strategy = content.get("mix_strategy")
    if strategy in _DRAWN and not reading.flag(content, "eval_on_each_dataset"):
        text = (
            f"mixed by {strategy} there: rows are left out, or come twice; launcher measures every row once"
        )
        reading.cannot_say("eval_dataset", ", ".join(names), text)
