"""The tables of what other tools take where a file leaves a key out, held against those tools as they are
installed."""

from __future__ import annotations

import dataclasses
import inspect
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import Seq2SeqTrainingArguments, TrainingArguments, get_scheduler

from launcher.importing import accelerate, defaults, seq2seq, sft, starting, trainer, trainer_keys
from launcher.importing.job import import_files
from launcher.job.schema import Training
from launcher.training.schedule import Schedule

NUM_STEPS = 20


def fields_of(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass with their defaults."""
    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(kind)
    }


def assert_equal(table: defaults.Defaults, found: dict[str, Any], but: set[str]) -> None:
    """Every default of the table is the one that is installed; `but` are keys that are more than one field's
    value."""
    for key, (said, value) in table.values.items():
        if key not in but:
            assert found[said] == value, key


def test_the_trainers() -> None:
    found = fields_of(TrainingArguments)
    assert_equal(defaults.TRAINER, found, {"training.optimizer", "training.betas", "precision"})
    assert found["optim"] == "adamw_torch_fused"
    assert [found["adam_beta1"], found["adam_beta2"]] == defaults.TRAINER.values["training.betas"][1]
    assert found["bf16"] is False and found["fp16"] is False  # fp32


def test_every_argument_of_the_trainer_is_in_a_table() -> None:
    """A version that has another one says so here, and a user hears of it as of a key that launcher does not
    know."""
    tables = (
        trainer.READ
        | trainer_keys.REPORTS
        | trainer_keys.PLACES
        | trainer_keys.CHANGES.keys()
        | {"accelerator_config"}
    )
    assert fields_of(TrainingArguments).keys() - tables == set()


def test_every_argument_that_is_the_seq2seq_trainers_alone_is_read() -> None:
    own = fields_of(Seq2SeqTrainingArguments).keys() - fields_of(TrainingArguments).keys()
    assert own == seq2seq.MARKS | {"generation_config"} and own <= seq2seq.READ


@pytest.mark.parametrize("key", sorted(trainer_keys.CHANGES.keys() & fields_of(TrainingArguments).keys()))
def test_what_the_trainer_has_by_default_changes_nothing(key: str) -> None:
    found = fields_of(TrainingArguments)[key]
    assert trainer_keys.does_nothing(key, found)


@pytest.mark.parametrize("parser", [launch_command_parser, get_args_parser], ids=["accelerate", "torchrun"])
def test_every_flag_that_takes_no_value_is_known_as_such(parser: Callable[[], ArgumentParser]) -> None:
    """Another one would take the next word, which may be the script, for its value."""
    flags = {name for action in parser()._actions if action.nargs == 0 for name in action.option_strings}
    assert {name.lstrip("-").replace("-", "_") for name in flags} - starting._SWITCHES == set()


def test_every_key_of_accelerates_file_is_known() -> None:
    own = {field.name for field in dataclasses.fields(ClusterConfig)}
    lacking = {"fp8_config", "megatron_lm_config"}  # which an import says
    assert own - accelerate._KNOWN - {*accelerate._PLACE} == lacking


def test_trls() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed; the table was held against TRL 1.16")
    found = fields_of(trl.SFTConfig)
    assert_equal(defaults.TRL, found, {"training.optimizer", "training.betas", "precision"})
    assert found["bf16"] is None  # made true, unless fp16 is
    adapter, table = fields_of(trl.ModelConfig), defaults.TRL_ADAPTER
    assert (adapter["lora_r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (
        table.rank,
        table.alpha,
        table.dropout,
    )
    assert adapter["lora_target_modules"] is None and adapter["use_peft"] is False
    read = {
        *sft.ADAPTER.all(),
        *sft._LEARNED,
        *sft._DATA,
        *sft._MIXTURES,
        *trainer.READ,
        *trainer_keys.REPORTS,
        *trainer_keys.PLACES,
    }
    read |= {*trainer_keys.CHANGES, "accelerator_config", *sft.MARKS, "loss_type"}
    own = found.keys() | adapter.keys() | fields_of(trl.ScriptArguments).keys()
    assert own - read == set()


def test_deepspeeds() -> None:
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime import constants
    from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR

    def of(kind: Any) -> dict[str, Any]:
        return {
            name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()
        }

    adam, table = of(FusedAdam), defaults.DEEPSPEED.values
    assert (adam["lr"], adam["weight_decay"]) == (
        table["training.learning_rate"][1],
        table["training.weight_decay"][1],
    )
    assert (list(adam["betas"]), adam["eps"]) == (table["training.betas"][1], table["training.epsilon"][1])
    assert constants.GRADIENT_CLIPPING_DEFAULT == defaults.DEEPSPEED_CLIPPING
    assert of(WarmupLR)["warmup_num_steps"] == of(WarmupCosineLR)["warmup_num_steps"] == 1000
    assert of(WarmupDecayLR)["warmup_max_lr"] == 0.001 and of(WarmupLR)["warmup_max_lr"] is None
    assert of(WarmupCosineLR)["cos_min_ratio"] == 0.0001 and of(WarmupLR)["warmup_type"] == "log"


SCHEDULES: list[tuple[str, dict[str, Any], int]] = [
    ("linear", {}, 0),
    ("linear", {}, 4),
    ("cosine", {}, 0),
    ("cosine", {"num_cycles": 0.5}, 4),
    ("cosine_with_restarts", {}, 0),
    ("cosine_with_restarts", {"num_cycles": 1}, 4),
    ("polynomial", {}, 0),
    ("polynomial", {"lr_end": 1e-4, "power": 1.0}, 4),
    ("cosine_with_restarts", {"num_cycles": 3}, 4),
    ("polynomial", {"lr_end": 1e-4, "power": 3.0}, 4),
    ("warmup_stable_decay", {"num_decay_steps": 5}, 4),
    ("warmup_stable_decay", {"num_decay_steps": 7, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}, 0),
    ("cosine_with_min_lr", {"min_lr": 2e-4}, 4),
    ("cosine_with_min_lr", {"min_lr_rate": 0.25}, 0),
    ("constant", {}, 4),
    ("constant_with_warmup", {}, 4),
    ("inverse_sqrt", {}, 4),
    ("inverse_sqrt", {}, 0),
]


@pytest.mark.parametrize(("name", "options", "warmup"), SCHEDULES)
def test_an_imported_schedule_is_transformers_own(
    name: str, options: dict[str, Any], warmup: int, tmp_path: Path
) -> None:
    """Step by step, but for the warm-up, where launcher is one step ahead (and says so)."""
    rate = 1e-3
    file = tmp_path / "arguments.yaml"
    content = {
        "output_dir": "o",
        "learning_rate": rate,
        "max_steps": NUM_STEPS,
        "lr_scheduler_type": name,
        "warmup_steps": warmup,
    }
    file.write_text(
        yaml.safe_dump(content | ({"lr_scheduler_kwargs": options} if options else {})), encoding="utf-8"
    )
    made = import_files([file])
    ours = Schedule.of(Training.model_validate(made.content["training"]), NUM_STEPS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    theirs = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=NUM_STEPS,
        scheduler_specific_kwargs=options,
    )
    rates = []
    for _ in range(NUM_STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ahead = warmup if name != "constant" else 0
    assert [ours.at(step) for step in range(ahead, NUM_STEPS)] == pytest.approx(
        rates[ahead:], rel=1e-12, abs=1e-15
    )
    assert [ours.at(step) for step in range(ahead - 1)] == pytest.approx(rates[1:ahead])
    remarks = {remark.said for remark in made.remarks if remark.kind == "changes meaning"}
    assert remarks == ({"warmup_steps"} if ahead else set())
    assert not [remark for remark in made.remarks if remark.kind == "cannot be said"]
