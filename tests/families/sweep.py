"""How samples may share a pass, family by family: what was found, as JSON.

python -m tests.families.sweep [--out FILE] [--processes N] [--limit SECONDS] [model_type ...]
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from tests.families import tiny
from tests.families.audio import audio_of
from tests.families.captions import captions_of
from tests.families.causal import causal_lm
from tests.families.classifiers import classification_of
from tests.families.encoders import KINDS, found_of
from tests.families.image_chats import image_chats_of
from tests.families.images import images_of
from tests.families.numbers import message
from tests.families.special import UNABLE, VARIANTS
from tests.families.speech import speech_of

RAW = Path(__file__).with_name("raw.json")


TASKS: dict[str, Callable[[str], dict[str, Any]]] = {
    tiny.CAUSAL_LM: causal_lm,
    tiny.SEQUENCE_CLASSIFICATION: classification_of,
    tiny.IMAGE_CLASSIFICATION: images_of,
    tiny.AUDIO_CLASSIFICATION: audio_of,
    tiny.SPEECH_RECOGNITION: speech_of,
    tiny.IMAGE_TO_TEXT: captions_of,
    tiny.IMAGE_TEXT_TO_TEXT: image_chats_of,
    **{task: functools.partial(found_of, task) for task in KINDS},
}
NAMES = {
    tiny.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    tiny.SEQUENCE_CLASSIFICATION: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    tiny.MASKED_LM: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    tiny.TOKEN_CLASSIFICATION: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    tiny.QUESTION_ANSWERING: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    tiny.IMAGE_CLASSIFICATION: modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    tiny.AUDIO_CLASSIFICATION: modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    tiny.SPEECH_RECOGNITION: {
        **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        **modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    },
    tiny.IMAGE_TO_TEXT: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    tiny.IMAGE_TEXT_TO_TEXT: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    tiny.SEQUENCE_TO_SEQUENCE: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
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


def types_of(task: str) -> list[str]:
    """Return all types that a task is tried with, and `type+variant` where a value in the config decides."""
    return [*NAMES[task], *(name for of, name in VARIANTS if of == task)]


def run(
    jobs: list[tuple[str, str]],
    processes: int,
    limit: float,
    done: Callable[[str, str, dict[str, Any]], None],
) -> None:
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


def as_lines(content: dict[str, Any]) -> str:
    """Write JSON with one line for each type, so that a change of one is a change of one line."""
    parts = []
    for key, value in content.items():
        inner = (
            value
            if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())
            else None
        )
        lines = (
            ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in inner.items())
            if inner
            else ""
        )
        parts.append(f" {json.dumps(key)}: " + (f"{{\n{lines}\n }}" if inner else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Sweep the types asked for, or all, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, default=RAW)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=240.0)
    options = parser.parse_args()
    wanted = {task: types_of(task) for task in TASKS}
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
        options.out.write_text(as_lines(kept))
        print(
            task,
            model_type,
            found.get("layout"),
            found.get("attention"),
            found.get("head"),
            found.get("reason"),
            flush=True,
        )

    run(jobs, options.processes, options.limit, done)


if __name__ == "__main__":
    main()
