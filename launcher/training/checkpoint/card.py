"""Model cards: a model's data and training, its metrics, and how to load it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import TASK_MAPPING

from launcher import __version__, tasks
from launcher.data.section import Sources
from launcher.job.adapter import KINDS
from launcher.metrics import told
from launcher.plain_files import read_json, read_text
from launcher.planner.plan import Plan
from launcher.redaction import redact
from launcher.runs import prepared
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals
from launcher.runs.wording import duration
from launcher.tasks.generation import Generate
from launcher.training.demo.models import PACKAGES, name_of
from launcher.training.model.model_files import directory_of

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "tokenizers")
_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".tsv": "csv", ".txt": "text"}
"""The names of `datasets`' readers by file suffix, if they differ from the suffix."""
_LICENCE = ("license", "license_name", "license_link", "language")


class Card:
    """The card of a run's model at a step."""

    def __init__(
        self, run: RunDirectory, plan: Plan, step: int, metrics: Mapping[str, float], adapter: bool
    ) -> None:
        """Store the arguments. `metrics` are those of `step`, empty if it was not evaluated; `adapter` means
        that only the adapter is exported."""
        self._run, self._plan, self._step, self._metrics, self._adapter = run, plan, step, metrics, adapter
        self._totals = Totals(run).refresh()
        self._config: dict[str, Any] = read_json(run.path / "model" / "config.json")
        self._base = _base(plan)

    def write(self, directory: Path) -> None:
        """Write README.md into a model's directory. Raises OSError."""
        text = "\n\n".join(part for part in self._parts() if part)
        (directory / "README.md").write_text(
            f"---\n{self._data().to_yaml()}\n---\n\n{text}\n", encoding="utf-8"
        )

    def _data(self) -> ModelCardData:
        """Return the card's metadata for the hub."""
        plan, tag = self._plan, pipeline_tag(self._config)
        given = [source for source in (plan.data.train, plan.data.evaluation) if source is not None]
        sources = [source for one in given for source in one.parts]
        extra: dict[str, Any] = _licence(plan)
        if self._adapter and plan.model.adapter is not None:
            extra["tags"] = [
                plan.model.adapter.method,
                *([f"base_model:adapter:{self._base}"] if self._base else []),
            ]
        return ModelCardData(
            base_model=self._base,
            datasets=sorted({source.name for source in sources if source.name}) or None,
            library_name="peft" if self._adapter else "transformers",
            metrics=[name for name in self._metrics if name != "loss"] or None,
            model_name=plan.name,
            pipeline_tag=tag,
            eval_results=self._results(tag) or None,
            **extra,
        )

    def _results(self, tag: str | None) -> list[EvalResult]:
        source = self._plan.data.evaluation
        if source is None or source.sources or tag is None:  # metrics of several sources have no one data set
            return []
        suffix = PurePath(str(source.path)).suffix.lower()
        kind = source.name or _BUILDERS.get(suffix, suffix.lstrip(".")) or "arrow"
        of: dict[str, Any] = {"task_type": tag, "dataset_type": kind, "dataset_name": _name(source)}
        if source.name:
            of |= {"dataset_config": source.subset, "dataset_split": source.split}
        finite = {name: value for name, value in self._metrics.items() if math.isfinite(value)}
        return [
            EvalResult(**of, metric_type=name, metric_value=round(value, 6)) for name, value in finite.items()
        ]

    def _parts(self) -> Iterator[str]:
        plan = self._plan
        yield f"# {plan.name}"
        adapter = plan.model.adapter if self._adapter else None
        kind = KINDS[adapter.method] if adapter is not None else ""
        what = f"An adapter ({kind}) for" if self._adapter else "Fine-tuned from"
        begins = f"{what} `{self._base}`"
        if self._base is None:
            begins = "Trained from random weights"
            if not _is_random(plan):
                begins = f"{what} the model in a directory that was called `{Path(plan.model.name).name}`"
        yield f"{begins}, for {plan.task}: {self._step:,} steps of launcher {__version__}."
        if self._base is None and not _is_random(plan):
            yield "Add that model's name on the hub above, as `base_model`, before you share this one."
        if not _licence(plan):
            unknown = "The licence of the base model was not found beside it"
            yield f"{unknown}; add `license` above before you share this model."
        yield f"## Load it\n\n```python\n{self._loading()}\n```"
        yield "## Data\n\n" + "\n".join(self._rows())
        yield self._measured()
        yield "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in self._training())
        yield f"The job:\n\n```yaml\n{_job(self._run, plan)}```"

    def _loading(self) -> str:
        task = tasks.unprepared(self._plan)
        if task.parts:
            kinds = {name: part.auto_class.__name__ for name, part in task.parts.items()}
            lines = [
                f"from transformers import {', '.join(sorted({*kinds.values(), task.processor_class}))}",
                "",
            ]
            lines += [f'model = {kind}.from_pretrained("DIRECTORY/{name}")' for name, kind in kinds.items()]
            reader = f"{task.processor_class}.from_pretrained"
            return "\n".join([*lines, f'tokenizer = {reader}("DIRECTORY/{next(iter(kinds))}")'])
        # For tasks whose models have several Auto classes, launcher defines its own.
        kind = task.auto_class.__name__
        kind = kind if hasattr(transformers, kind) else self._config["architectures"][0]
        reader, name = task.processor_class, "processor" if task.has_processor else "tokenizer"
        if self._adapter:
            labels = f", num_labels={len(self._config['id2label'])}" if "id2label" in self._config else ""
            named = [kind]
            if task.writes and (self._run.path / "model" / "generation_config.json").is_file():
                # The run's end tokens differ from the base's: the end of a chat turn is one, too.
                named.append("GenerationConfig")
                labels += ', generation_config=GenerationConfig.from_pretrained("DIRECTORY")'
            base = f'{kind}.from_pretrained("{self._base or "DIRECTORY_OF_THAT_MODEL"}"{labels})'
            imports = f"from peft import PeftModel\nfrom transformers import {', '.join(sorted(named))}"
            return f'{imports}\n\nmodel = PeftModel.from_pretrained({base}, "DIRECTORY")'
        parts = [("model", kind), (name, reader)]
        parts += [("tokenizer", "AutoTokenizer")] if task.joins_tokenizer else []
        lines = [f"from transformers import {', '.join(sorted(one for _, one in parts))}", ""]
        lines += [f'{part} = {one}.from_pretrained("DIRECTORY")' for part, one in parts]
        return "\n".join(lines)

    def _rows(self) -> Iterator[str]:
        for role, source in (("train", self._plan.data.train), ("evaluation", self._plan.data.evaluation)):
            if source is None:
                continue
            message = self._totals.prepared.get(role)
            rows = "" if message is None else f": {prepared.line(message).removeprefix(f'{role}: ')}"
            digest = _digest(self._run, role)
            yield f"- {role}: `{_name(source)}`{rows}" + (
                f"; xxh3 of the contents {digest}" if digest else ""
            )

    def _measured(self) -> str:
        if self._plan.data.evaluation is None:
            return ""
        first = (self._totals.evaluations or ({},))[0]
        before = first.get("metrics", {}) if first.get("step") == 0 else {}
        if not self._metrics and not before:
            return ""
        where = f"On `{_name(self._plan.data.evaluation)}`, in {self._plan.precision}"
        lines = [
            f"{where}; after step {self._step:,}."
            if self._metrics
            else f"{where}. Step {self._step:,} itself was not evaluated."
        ]
        known = _details(self._run, self._step)
        lines += ["", "| metric | before | after |", "|---|---|---|"]
        for name in dict.fromkeys([*self._metrics, *before]):
            cells = (f"{of[name]:.4f}" if name in of else "" for of in (before, self._metrics))
            lines.append(f"| {told(name, known)} | {' | '.join(cells)} |")
        lines += ["", written] if (written := self._written()) else []
        return "## Metrics\n\n" + "\n".join(lines)

    def _written(self) -> str:
        """Return a sentence with the arguments of `generate` behind the metrics; empty without generation."""
        evaluation = self._plan.evaluation
        settings = None if evaluation is None else evaluation.generate
        if settings is None and "wer" in self._metrics and self._config.get("is_encoder_decoder"):
            settings = Generate()  # speech recognition generates even without settings
        if settings is None:
            return ""
        named = [f"{name}={value!r}" for name, value in settings.arguments.items()]
        named += ["tokenizer=tokenizer"] * bool(settings.stop_strings)
        drawn = f", drawn by launcher with seed {settings.seed}" if settings.do_sample else ""
        return f"Answers are what `model.generate(**inputs, {', '.join(named)})` writes{drawn}."

    def _training(self) -> Iterator[tuple[str, str]]:
        plan, training = self._plan, self._plan.training
        message = self._totals.last.get("training", {})
        ranks, nodes = plan.mesh.world_size, plan.mesh.nodes
        device = message.get("device") or plan.mesh.device
        yield "hardware", f"{ranks} rank{'s' * (ranks != 1)} on {nodes} node{'s' * (nodes != 1)}, {device}"
        attempts = max(1, self._run.last_attempt())
        yield (
            "time",
            f"{duration(self._totals.seconds_in_attempts)} over {attempts} attempt{'s' * (attempts != 1)}",
        )
        yield "engine", f"{plan.engine}, {plan.sharding} sharding, {plan.precision}"
        if plan.model.adapter is not None:
            merged = "" if self._adapter else ", merged into the weights"
            yield "adapter", f"{plan.model.adapter.title}{merged}"
        yield "batch", f"{plan.batch.global_batch_size} samples a step"
        rate = f"learning rate {training.learning_rate:g}, {training.schedule}"
        yield (
            "optimizer",
            f"{training.optimizer}, {rate}, weight decay {training.weight_decay:g}, seed {training.seed}",
        )
        versions = [f"launcher {__version__}"]
        for name in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{name} {importlib.metadata.version(name)}")
        yield "versions", ", ".join(versions)


def pipeline_tag(config: dict[str, Any]) -> str | None:
    """Return transformers' name of the pipeline for a model's class; None if there is none."""
    own = set(config.get("architectures") or ())
    for tag, mapping in TASK_MAPPING.items():
        names = mapping.get(config.get("model_type"), ())
        if own & ({names} if isinstance(names, str) else set(names)):
            return str(tag)
    return None


def _is_random(plan: Plan) -> bool:
    """Return whether the run's initial weights were random."""
    return plan.model.weights == "random" or plan.model.config is not None


def _base(plan: Plan) -> str | None:
    """Return the run's initial model by its name on the hub; None if its weights were random, or if it was in a
    directory, whose name says nothing to others."""
    if _is_random(plan):
        return None
    if not Path(plan.model.name).is_absolute():
        return plan.model.name
    packaged = name_of(plan.model.name)
    return PACKAGES[packaged].hub if packaged is not None else None


def _licence(plan: Plan) -> dict[str, Any]:
    """Return licence and language from the base model's own card."""
    directory = directory_of(plan)
    if directory is None or not (directory / "README.md").is_file():
        return {}
    try:
        message = ModelCard(read_text(directory / "README.md"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: message[key] for key in _LICENCE if message.get(key)}


def _name(given: Sources) -> str:
    return "`, `".join(source.name or PurePath(str(source.path)).name for source in given.parts)


def _details(run: RunDirectory, step: int) -> dict[str, Any]:
    try:
        return dict(read_json(run.evaluation(step))["details"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(run: RunDirectory, role: str) -> str | None:
    try:
        return str(read_json(run.path / f"data-{role}.json")["source_hash"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _job(run: RunDirectory, plan: Plan) -> str:
    """Return the job file without machine or site settings, and with file names instead of paths."""
    try:
        content = yaml.safe_load(read_text(run.job_file))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        content = {"name": plan.name, "model": {"name": plan.model.name, "task": plan.task}}
    kept = {key: _short(value) for key, value in content.items() if key != "cluster"}
    return redact(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=False))


def _short(value: Any) -> Any:
    """Return the value with absolute paths shortened to file names."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else value
