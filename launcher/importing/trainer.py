"""The Hugging Face Trainer's arguments, from JSON, YAML or a command line."""

from __future__ import annotations

from typing import Any

from launcher.importing import optimizers, seq2seq, sft, trainer_keys, trainer_running, trl_data
from launcher.importing.defaults import TRAINER, Defaults
from launcher.importing.reading import Reading, brief

_NUMBERS = {
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "adam_epsilon": "training.epsilon",
    "max_grad_norm": "training.clip_norm",
}
_COUNTS = {
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.accumulation_steps",
    "save_total_limit": "checkpoint.keep_last",
    "max_train_samples": "data.train.limit",
}
_WORDS = {
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "attn_implementation": "model.attention",
    "train_file": "data.train.path",
    "validation_file": "data.evaluation.path",
    "dataset_text_field": "data.text",
    "run_name": "name",
}
_LENGTHS = ("max_seq_length", "max_length", "model_max_length", "block_size", "max_source_length")
_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_PROJECTS = {"wandb": "wandb_project", "trackio": "project"}
"""The key of each tracker's project: TrainingArguments has one for trackio only; scripts use W&B's."""
MARKS = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs",
    "lr_scheduler_type", "gradient_accumulation_steps", "warmup_ratio", "max_grad_norm", "save_total_limit",
    "evaluation_strategy", "eval_strategy", "save_strategy", "adam_beta1", "adam_beta2", "adam_epsilon",
    "optim", "label_smoothing_factor",
}  # fmt: skip
"""The Trainer's own arguments: a script that has one of them has its defaults for the others."""
READ = {
    "num_train_epochs", "max_steps", "max_train_steps", "warmup_steps", "num_warmup_steps", "warmup_ratio",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "adam_beta1", "adam_beta2", "adafactor", "bf16",
    "fp16", "gradient_checkpointing", "activation_checkpointing", "seed", "save_strategy", "save_steps",
    "eval_strategy", "evaluation_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model",
    "report_to", "torch_compile", "use_cpu", "no_cuda", "fsdp", "fsdp_config", "deepspeed",
    "deepspeed_config", "trust_remote_code", "torch_dtype", "dtype", *_NUMBERS, *_COUNTS, *_WORDS, *_LENGTHS,
}  # fmt: skip


def read(content: dict[str, Any], reading: Reading, is_sft: bool = False) -> None:
    """Record the facts of TrainingArguments and of a script's usual other arguments, including those of TRL and
    Seq2SeqTrainer."""
    writes = not is_sft and bool(seq2seq.MARKS & content.keys())
    if is_sft or (
        not writes
        and (
            sft.MARKS & content.keys()
            or {"dataset_name", "max_length"} <= content.keys()
            or "max_prompt_length" in content
        )
    ):
        return arguments(content, reading, sft.DEFAULTS, sft.read(content, reading))
    own = sft.adapter_of_a_script(content, reading) | trl_data.data_set(content, reading)
    if writes:
        own |= seq2seq.read(content, reading)
    known = (MARKS | seq2seq.MARKS) & (content.keys() | reading.unknown)
    arguments(content, reading, TRAINER if known else None, own)
    return None


def arguments(
    content: dict[str, Any], reading: Reading, defaults: Defaults | None, read_elsewhere: set[str]
) -> None:
    """Record the Trainer's own arguments, and its defaults for those left out; `read_elsewhere` are the
    keys that were already read."""
    reading.take(content, _NUMBERS, Reading.number)
    reading.take(content, _COUNTS, Reading.count)
    reading.take(content, {"seed": "training.seed"}, Reading.size)
    _words(content, reading, read_elsewhere)
    _length(content, reading)
    _optimizer(content, reading, defaults)
    trainer_running.precision(content, reading)
    trainer_running.saving(content, reading)
    trainer_running.engine(content, reading)
    if defaults is not None:
        defaults.apply(reading)
    optimizers.warmup(reading)
    _epochs(reading)
    if defaults is TRAINER:
        _accumulation(reading)
    trainer_keys.rest(content, READ | read_elsewhere, reading)


def _words(content: dict[str, Any], reading: Reading, read_elsewhere: set[str]) -> None:
    for option, key in _WORDS.items():
        word = None if option in read_elsewhere else reading.word(content, option)
        if word is not None and key == "model.attention" and word not in _ATTENTION:
            if word != "auto":
                text = f"launcher has {', '.join(_ATTENTION)}; left to `launcher plan`"
                reading.cannot_say(option, word, text)
        elif word is not None:
            reading.record(key, word, option)
    for option in _LENGTHS:
        if (length := reading.count(content, option, least=8)) is not None:
            reading.record("data.max_length", length, option)
            if option == "block_size":
                text = (
                    "scripts with a block_size join all texts and cut them every so many tokens; launcher "
                    "keeps rows apart"
                )
                reading.cannot_say(option, length, text)
    if reading.flag(content, "trust_remote_code"):
        reading.record("model.trust_remote_code", True, "trust_remote_code")
        text = "as it is there: code that comes with the model runs, so read it first"
        reading.choose("trust_remote_code", True, text)
    reports = content.get("report_to")
    listed = [
        brief(name)
        for name in ([reports] if isinstance(reports, str) else reports if isinstance(reports, list) else [])
    ]
    known = [name for name in listed if name in _TRACKERS]
    if known:
        reading.record("trackers", known, "report_to")
    for tracker, key in _PROJECTS.items():
        if tracker in known and isinstance(project := content.get(key), str) and project:
            reading.record_once("tracking.project", project, key)
    if other := [name for name in listed if name not in (*_TRACKERS, "none", "all")]:
        text = (
            f"launcher has {', '.join(_TRACKERS)}, and always metrics.jsonl; nothing that is learned "
            "changes by it"
        )
        reading.ignore("report_to", ", ".join(other), text)


def _length(content: dict[str, Any], reading: Reading) -> None:
    counted = "max_train_steps" if content.get("max_train_steps") is not None else "max_steps"
    steps = None if str(content.get(counted)) in ("-1", "-1.0", "0") else reading.count(content, counted)
    epochs = reading.number(content, "num_train_epochs")
    if steps is not None:
        reading.record("training.max_steps", steps, counted)
        if epochs is not None:
            reading.ignore("num_train_epochs", epochs, f"{counted} is there too, and goes before it")
    elif epochs:
        reading.record("training.epochs", epochs, "num_train_epochs")
    option = "warmup_steps" if "warmup_steps" in content else "num_warmup_steps"
    steps_of_warmup = reading.number(content, option)
    ratio = reading.number(content, "warmup_ratio")
    if ratio is not None and ratio >= 1:
        reading.refuse("warmup_ratio", ratio, "is a share of all steps, below 1")
    if steps_of_warmup:
        reading.record("training.warmup", steps_of_warmup, option)
        if ratio:
            reading.ignore("warmup_ratio", ratio, f"{option} is there too, and the Trainer goes by it")
    elif ratio is not None or steps_of_warmup is not None:
        reading.record("training.warmup", ratio or 0.0, "warmup_ratio" if ratio is not None else option)


def _epochs(reading: Reading) -> None:
    fact = next((fact for fact in reading.facts if fact.key == "training.epochs"), None)
    if fact is not None and float(fact.value) > 1:
        text = (
            "an epoch of the Trainer's ends with a smaller batch where its rows do not divide; launcher's "
            "batches go on into the next"
        )
        reading.change(fact.said, fact.value, text)


def _accumulation(reading: Reading) -> None:
    """Record how the Trainer averages the loss of a classifier over micro-batches (transformers 5.23:
    `model_accepts_loss_kwargs` of its own classes)."""
    fact = next((fact for fact in reading.facts if fact.key == "batch.accumulation_steps"), None)
    if fact is not None and fact.value > 1:
        text = (
            "of a language model the same; of a classifier the Trainer adds up the micro-batches' means, "
            "so that losses and gradients are "
        )
        text += (
            f"{fact.value} times launcher's: training.clip_norm and epsilon divided by {fact.value} make "
            "AdamW the same"
        )
        reading.cannot_say(fact.said, fact.value, text)


def _optimizer(content: dict[str, Any], reading: Reading, defaults: Defaults | None) -> None:
    name = reading.word(content, "lr_scheduler_type")
    options = reading.section(content, "lr_scheduler_kwargs")
    if name is None and options and defaults is not None:
        name = str(defaults.values["training.schedule"][1])
    if name is not None:
        optimizers.trainer_schedule(name.rpartition(".")[2].lower(), options, "lr_scheduler_type", reading)
    elif options:
        text = "no lr_scheduler_type says which schedule they are of"
        reading.cannot_say("lr_scheduler_kwargs", "{...}", text)
    if reading.flag(content, "adafactor"):
        optimizers.trainer_optimizer("adafactor", "adafactor", reading)
    elif (name := reading.word(content, "optim")) is not None:
        optimizers.trainer_optimizer(name.rpartition(".")[2].lower(), "optim", reading)
    if content.get("adam_beta1") is not None or content.get("adam_beta2") is not None:
        pair = [0.9 if content.get("adam_beta1") is None else content["adam_beta1"]]
        pair += [0.999 if content.get("adam_beta2") is None else content["adam_beta2"]]
        optimizers.betas(pair, "adam_beta1, adam_beta2", reading)
