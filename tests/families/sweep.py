"""How samples may share a pass, family by family: every way held against the model's own loss of each sample alone.

python -m tests.families.sweep [--out FILE] [--processes N] [--limit SECONDS] [model_type ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AttentionInterface
from transformers.models.auto import modeling_auto

from launcher.training.attention import PACKED, packed_attention, register
from tests.families import tiny
from tests.families.classifiers import classification_of
from tests.families.heads import HEADS, Auxiliary, call
from tests.families.layouts import LAYOUTS, packed, samples, single
from tests.families.numbers import LOSS, NEAR, Numbers, close, figures, is_ok, measured, message
from tests.families.special import UNABLE, VARIANTS

RAW = Path(__file__).with_name("raw.json")
CANDIDATES = [
    *(("packed", attention) for attention in ("packed", "sdpa", "eager")),
    *((layout, attention) for layout in ("padded", "padded-positions", "single") for attention in ("sdpa", "eager")),
]
"""The fastest first: the first that is right is a family's own."""
_STATE = re.compile(r"Mamba|Mixer|ShortConv|Gated?Delta|Lightning|Recurrent|Rwkv|xLSTM|KimiDelta|DeltaAttention|DeltaNet|Rglru|^Conv1d$")
_PACKAGES = ("flash-linear-attention",)
_EYES = re.compile("vision|audio|image")


@dataclass
class Family:
    """The models of one type with equal weights, by attention and precision, and what is right for them."""

    model_type: str
    models: dict[tuple[str, torch.dtype], Any] = field(default_factory=dict)

    def model(self, attention: str, dtype: torch.dtype = torch.float32) -> Any:
        """The model with this attention; what refuses to be built says so each time."""
        if (attention, dtype) not in self.models:
            experts = "eager" if dtype == torch.float64 else None  # fused experts know no float64
            model = tiny.model_of(self.model_type, tiny.CAUSAL_LM, register(attention), dropout=0.0, experts=experts)
            self.models[attention, dtype] = model.train().to(dtype)
        return self.models[attention, dtype]

    def reference_attention(self) -> str:
        """Eager, or fused where the class refuses eager."""
        try:
            self.model("eager")
        except (ValueError, ImportError, NotImplementedError):
            return "sdpa"
        return "eager"


def own_loss(model: Any, ids: list[torch.Tensor]) -> Any:
    """The loss that the model itself gives each sample alone, weighted by supervised tokens."""
    total: Any = 0.0
    for one in single(ids):
        labels = one.inputs["input_ids"]
        total = total + call(model, {**one.inputs, "labels": labels}).loss * (labels.shape[1] - 1)
    return total


def of_logits(model: Any, ids: list[torch.Tensor], auxiliary: Auxiliary) -> Any:
    """The same from the logits of each sample alone."""
    return sum(HEADS["forward"](model, one, auxiliary) for one in single(ids))


def causal_lm(model_type: str) -> dict[str, Any]:
    """Try every candidate on one type and say which are right."""
    began = time.monotonic()
    family, ids = Family(model_type), samples()
    reference = family.reference_attention()
    model = family.model(reference)
    found: dict[str, Any] = {"class": type(model).__name__, "layout": None, "attention": None, "head": None, "reference": reference}
    found |= facts(family, model, ids)
    auxiliary = Auxiliary(model, ids[2])
    found["aux"] = bool(auxiliary.coefficient)
    right = {torch.float32: measured(model, own_loss(model, ids))}
    plain = measured(model, of_logits(model, ids, auxiliary))
    own = {torch.float32: True}
    found["own_loss_is_cross_entropy"] = own[torch.float32] = close(plain.against(right[torch.float32]))
    if not own[torch.float32]:
        found["own_loss"], found["cross_entropy"] = right[torch.float32].loss, plain.loss
        found["own_loss_is_unshifted"] = bool(abs(_unshifted(model, ids) / right[torch.float32].loss - 1) < LOSS)
        right[torch.float32] = plain
    found["eval_differs"] = _differs(model, ids, own_loss)
    found["leak"] = leak(model, ids, auxiliary)
    found["tried"] = {}
    for layout, attention in CANDIDATES:
        for head in HEADS:
            if layout in ("padded-positions", "single") and any(is_ok(said) for said in found["tried"].values()):
                continue
            name = f"{layout}/{attention}/{head}"
            found["tried"][name] = verdict(family, reference, auxiliary, ids, right, (layout, attention, head))
    best = next((name for name, said in found["tried"].items() if is_ok(said)), None)
    if best is not None:
        found["layout"], found["attention"], found["head"] = best.split("/")
    found["reason"] = "; ".join(_reasons(found)) or None
    found["needs"] = next((each for each in _PACKAGES if any(each in said for said in found["tried"].values())), None)
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _reasons(found: dict[str, Any]) -> list[str]:
    """What to know of a family beside its way."""
    return [
        text
        for text, holds in {
            "no candidate is right": found["layout"] is None,
            "not causal: a later token changes earlier logits": not found["causal"],
            "its own loss asks each position for its own token": found.get("own_loss_is_unshifted", False),
            "its own loss is more than cross entropy and the router's": not found["own_loss_is_cross_entropy"]
            and not found.get("own_loss_is_unshifted"),
            "causal only with is_decoder": found.get("causal_without_is_decoder") is False,
        }.items()
        if holds
    ]


def verdict(family: Family, reference: str, auxiliary: Auxiliary, ids: Any, right: Any, candidate: tuple[str, str, str]) -> str:
    """`ok`, or by how much this candidate is wrong, or with which message it fails."""
    layout, attention, head = candidate

    def numbers(dtype: torch.dtype) -> Numbers:
        model = family.model(attention, dtype)
        total = sum(HEADS[head](model, one, auxiliary) for one in LAYOUTS[layout](ids))
        return measured(model, total)

    try:
        wrong = numbers(torch.float32).against(right[torch.float32])
    except Exception as error:
        return message(error)
    if close(wrong):
        return "ok"
    if all(each < NEAR for each in wrong):
        try:
            if torch.float64 not in right:
                model = family.model(reference, torch.float64)
                right[torch.float64] = measured(model, of_logits(model, ids, auxiliary))
            exact = numbers(torch.float64).against(right[torch.float64])
            return f"{'ok' if close(exact) else 'wrong'}: float32 {figures(wrong)}; float64 {figures(exact)}"
        except Exception as error:
            return f"near: {figures(wrong)}; float64 fails: {message(error)}"
    return f"wrong: {figures(wrong)}"


def leak(model: Any, ids: list[torch.Tensor], auxiliary: Auxiliary) -> str:
    """How far two samples in one row move the numbers where nothing tells them apart: far more than what counts as right."""
    pair = [ids[7], ids[13]]
    together = next(packed(pair))
    together.inputs = {"input_ids": together.inputs["input_ids"], "use_cache": False}
    try:
        wrong = measured(model, HEADS["forward"](model, together, auxiliary))
        return figures(wrong.against(measured(model, of_logits(model, pair, auxiliary))))
    except Exception as error:
        return message(error)


def _unshifted(model: Any, ids: list[torch.Tensor]) -> float:
    """What the loss would be if each position were asked for its own token."""
    with torch.no_grad():
        means = [(functional.cross_entropy(_logits(model, each), each), len(each) - 1) for each in ids]
    return float(sum(mean * weight for mean, weight in means))


def told_apart(family: Family, ids: list[torch.Tensor]) -> str:
    """What reaches launcher's packed attention of where samples begin: `all`, or what is lost on the way."""
    calls: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("cu_seq_lens_q") is not None)
        return packed_attention(*args, **kwargs)

    try:
        model = family.model("packed")
        AttentionInterface.register(PACKED, spy)
        with torch.no_grad():
            call(model, next(LAYOUTS["packed"](ids)).inputs)
    except Exception as error:
        return message(error)
    finally:
        register("packed")
    return "never called" if not calls else "all" if all(calls) else f"cu_seq_lens lost in {calls.count(False)} of {len(calls)} calls"


def facts(family: Family, model: Any, ids: list[torch.Tensor]) -> dict[str, Any]:
    """What the class reads, whether a later token changes earlier ones, and how long a sample may be."""
    sample = ids[2]
    with torch.no_grad():
        plain = _logits(model, sample)
        other = sample.clone()
        other[-10:] = (other[-10:] - 5 + 31) % (tiny.VOCABULARY - 5) + 5
        causal = _same(_logits(model, other)[:-10], plain[:-10])
        found: dict[str, Any] = {
            "causal": causal,
            "state": any(_STATE.search(type(each).__name__) for name, each in model.named_modules() if not _EYES.search(name)),
        }
        mask = torch.ones(1, len(sample), dtype=torch.long)
        mask[:, :5] = 0
        positions = 2 * torch.arange(len(sample))[None] % tiny.MAX_POSITIONS
        found["reads_mask"] = _reads(lambda: _same(_logits(model, sample, attention_mask=mask)[10:], plain[10:]))
        found["reads_positions"] = _reads(lambda: _same(_logits(model, sample, position_ids=positions), plain))
        found |= _longest(model)
    found["packed_attention"] = told_apart(family, ids)
    if getattr(model.config, "is_decoder", False):
        found["causal_without_is_decoder"] = _causal_encoder(family.model_type, sample, other)
    return found


def _causal_encoder(model_type: str, sample: torch.Tensor, other: torch.Tensor) -> bool | str:
    """Whether the class is causal as a checkpoint of an encoder has it: with is_decoder false."""
    config = tiny.config_of(model_type, tiny.CAUSAL_LM, 0.0)
    config.is_decoder = False
    try:
        model = tiny.model_of(model_type, tiny.CAUSAL_LM, "eager", config=config)
        with torch.no_grad():
            return _same(_logits(model, other)[:-10], _logits(model, sample)[:-10])
    except Exception as error:
        return message(error)


def _longest(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    names = [*("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "model_max_length", "context_length")]
    name = next((each for each in names if each in vars(config) or each in (config.attribute_map or {})), None)
    if name is None:
        return {"max_position": None, "hard_limit": False}
    try:
        _logits(model, torch.randint(5, tiny.VOCABULARY, (getattr(config, name) + 16,)))
    except Exception as error:
        return {"max_position": name, "hard_limit": True, "beyond": message(error)}
    return {"max_position": name, "hard_limit": False}


def _logits(model: Any, sample: torch.Tensor, **more: Any) -> torch.Tensor:
    return call(model, {"input_ids": sample[None], "use_cache": False, **more}).logits[0].float()


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool((left - right).abs().max() < 1e-4 * right.abs().max())


def _reads(same: Callable[[], bool]) -> bool | str:
    try:
        return not same()
    except Exception as error:
        return message(error)


def _differs(model: Any, ids: list[torch.Tensor], loss: Callable[..., Any]) -> bool:
    with torch.no_grad():
        training = float(loss(model, ids))
        model.eval()
        evaluating = float(loss(model, ids))
        model.train()
    return abs(evaluating / training - 1) > LOSS


TASKS = {tiny.CAUSAL_LM: causal_lm, tiny.SEQUENCE_CLASSIFICATION: classification_of}
NAMES = {
    tiny.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    tiny.SEQUENCE_CLASSIFICATION: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def _child(task: str, model_type: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    try:
        pipe.send(TASKS[task](model_type))
    except Exception as error:
        why = UNABLE.get((task, model_type), "cannot be built or run alone")
        pipe.send(
            {
                "class": str(NAMES[task][model_type.partition("+")[0]]),
                "layout": None,
                "attention": None,
                "head": None,
                "reason": f"{why}: {message(error)}",
            }
        )


def run(jobs: list[tuple[str, str]], processes: int, limit: float, done: Callable[[str, str, dict[str, Any]], None]) -> None:
    """One process for each, forked from this one, so that none can stop the others."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(jobs))
    running: dict[Any, tuple[Any, str, str, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            task, model_type = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(task, model_type, theirs))
            child.start()
            theirs.close()
            running[ours] = (child, task, model_type, time.monotonic() + limit)
        ready = multiprocessing.connection.wait(list(running), timeout=1.0)
        for ours in list(running):
            child, task, model_type, until = running[ours]
            if ours in ready:
                try:
                    found = ours.recv()
                except EOFError:
                    child.join()
                    found = {"reason": f"the process ended with {child.exitcode}"}
            elif time.monotonic() > until:
                child.kill()
                found = {"reason": f"not done within {limit:.0f} s"}
            else:
                continue
            child.join()
            del running[ours]
            done(task, model_type, found)


def main() -> None:
    """Sweep the types asked for, or all, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=RAW)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=240.0)
    options = parser.parse_args()
    wanted = {task: [*NAMES[task], *(name for of, name in VARIANTS if of == task)] for task in TASKS}
    jobs = [
        (task, name)
        for task in TASKS
        for name in wanted[task]
        if options.task in (None, task) and (not options.types or name in options.types)
    ]
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    kept["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    began = time.monotonic()

    def done(task: str, model_type: str, found: dict[str, Any]) -> None:
        kept.setdefault(task, {})[model_type] = found
        kept["missing"] = {each: sorted(set(wanted[each]) - set(kept.get(each, {}))) for each in TASKS}
        kept["seconds"] = round(time.monotonic() - began)
        for each in TASKS:
            kept[each] = dict(sorted(kept.get(each, {}).items()))
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
        print(task, model_type, found.get("layout"), found.get("attention"), found.get("head"), found.get("reason"), flush=True)

    run(jobs, options.processes, options.limit, done)


if __name__ == "__main__":
    main()
