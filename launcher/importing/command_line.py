"""The parts of a training command (`accelerate launch`, `torchrun`, `deepspeed`, `python`).

Nothing is executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from launcher.importing import axolotl, llama_factory, shell, slurm, starting, trainer
from launcher.importing.reading import Reading, Remark

STARTERS = (
    "accelerate-launch", "accelerate", "torchrun", "deepspeed", "llamafactory-cli", "axolotl", "trl",
    "python",
)  # fmt: skip
_NO_WRAPPERS = {
    "echo", "printf", "which", "type", "module", "ml", "pip", "pip3", "source", ".", "cd", "ls", "git", "apt",
    "apt-get", "grep", "kill", "pkill", "killall", "rm", "mkdir", "cp", "mv", "ln", "find", "test", "[", "[[",
    "set", "alias", "trap", "wait", "sleep", "cat", "tee", "hash", "command", "unset", "scontrol", "curl",
    "wget", "sed", "awk", "chmod", "pyenv", "brew",
}  # fmt: skip
"""Programs that never start another program."""
_WITH_RUN = ("conda", "mamba", "micromamba", "uv", "poetry", "pixi", "pdm", "hatch", "docker", "podman")
"""Programs that start another one only by `run` or `exec`."""
_BY_NAME = {"accelerate": ("launch",), "llamafactory-cli": ("train",), "axolotl": ("train",)}
"""Programs that train if their first argument is this word. TRL's first argument is the method."""
_STARTING_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate-launch",
    "axolotl.cli.train": "axolotl",
    "llamafactory.cli": "llamafactory-cli",
}
_OTHER_MODULES = (
    "pip", "venv", "ensurepip", "http.server", "json.tool", "ipykernel", "site", "build", "pytest",
)  # fmt: skip
_OTHER_LOSSES = re.compile(
    r"(?:^|_)(dpo|orpo|kto|ppo|grpo|rloo|reward|reward_modeling|rm|gkd|cpo|simpo|xpo)$", re.IGNORECASE
)


@dataclass(frozen=True)
class Training:
    """A command that starts a training."""

    starter: str
    words: list[str]
    """The words after the program: its flags, the script, the script's arguments."""
    before: list[str]
    """The words before the program, as `srun -N 2`."""
    rank: int
    """The certainty that it trains: 2 a launcher, 1 Python with a Trainer's arguments, 0 Python."""

    def __str__(self) -> str:
        return " ".join([self.starter, *self.words])[:80]


def read_script(text: str, reading: Reading) -> None:
    """Record the facts of a script: its `#SBATCH` lines, and the one command that starts a training."""
    try:
        script = shell.parse(text)
    except ValueError as error:
        return reading.refuse("command line", None, f"cannot be split into words: {error}")
    for name, default in script.variables.chosen.items():
        reading.choose(name, default[:40], "the script's own default, which its environment may change")
    _read_commands(script, reading)
    if directives := {
        key: value for words in script.directives for key, value in slurm.options(words)[0].items()
    }:
        slurm.read(directives, reading)
    reading.remarks = [_counted_by_slurm(remark, reading) for remark in reading.remarks]
    return None


def _counted_by_slurm(remark: Remark, reading: Reading) -> Remark:
    """Adjust a remark on numbers that the shell would fill in, if `#SBATCH` lines give them too."""
    key = starting.COUNTS.get(remark.said.removeprefix("--"))
    if remark.kind != "fill in" or key is None or not reading.has(key):
        return remark
    return replace(
        remark,
        kind="changes meaning",
        text="the shell fills this in; taken: the nodes and GPUs that are asked of Slurm",
    )


def read(words: list[str], reading: Reading) -> None:
    """Record the facts of a command line, given as words."""
    script = shell.Script()
    shell.take(words, script)
    _read_commands(script, reading)


def _read_commands(script: shell.Script, reading: Reading) -> None:
    trainings = [training for words in script.commands if (training := _training(words)) is not None]
    best = max((training.rank for training in trainings), default=0)
    trainings = [training for training in trainings if training.rank == best]
    if not trainings:
        return reading.refuse("command line", None, _nothing(script))
    for other in trainings[1:]:
        text = f"starts a training too, and one job is one training; taken: {trainings[0]}"
        reading.cannot_say("command", str(other), text)
    _read(trainings[0], reading)
    for index, word in enumerate(trainings[0].before):
        if PurePath(word).name == "srun":
            slurm.of_srun(trainings[0].before[index + 1 :], reading)
    return None


def _nothing(script: shell.Script) -> str:
    """Return the reason why no command of a script is used."""
    starters = f"one begins with {', '.join(STARTERS)}"
    for words in script.commands:
        variable = next((word for word in words if word.startswith("$")), None)
        if PurePath(words[0]).name in ("srun", "eval", "exec", "mpirun") and variable is not None:
            text = f"`{' '.join(words)[:60]}` runs what is in {variable}, which the script does not set"
            return f"{text}; write the command after --: launcher import -- torchrun ..."
        called = next((word for word in words[:6] if word.endswith((".sh", ".sbatch", ".slurm"))), None)
        if called is not None and PurePath(words[0]).name not in _NO_WRAPPERS:
            return f"no line here starts a training, but {called} is called: import that"
    return f"no line here starts a training; {starters}"


def _training(words: list[str]) -> Training | None:
    """Return the training that a command starts, after srun and similar prefixes; None if it starts none."""
    program = PurePath(words[0]).name
    if program in _NO_WRAPPERS or (program in _WITH_RUN and not {"run", "exec"} & set(words[1:4])):
        return None
    for index, word in enumerate(words):
        name, rest = PurePath(word).name, words[index + 1 :]
        starter = next((one for one in STARTERS if re.fullmatch(rf"{one}[\d.]*", name)), "")
        if starter == "python":
            return _of_python(rest, words[:index])
        if starter in _BY_NAME:
            if rest[:1] and rest[0] in _BY_NAME[starter]:
                return Training(
                    "accelerate-launch" if starter == "accelerate" else starter, rest[1:], words[:index], 2
                )
        elif starter and rest and (starter != "trl" or rest[0] == "sft" or _OTHER_LOSSES.search(rest[0])):
            return Training(starter, rest, words[:index], 2)
    return None


def _of_python(words: list[str], before: list[str]) -> Training | None:
    """Return the training of `python -m MODULE` or `python SCRIPT`; None if it cannot be one."""
    index = 0
    while index < len(words) and words[index].startswith("-") and words[index] not in ("-m", "-c"):
        index += 2 if words[index] in ("-W", "-X") else 1
    target = words[index : index + 2]
    if target[:1] == ["-m"] and len(target) == 2:
        if target[1] in _STARTING_MODULES:
            rest = words[index + 2 :]
            starter = _STARTING_MODULES[target[1]]
            return Training(
                starter,
                rest[1:] if starter == "llamafactory-cli" and rest[:1] == ["train"] else rest,
                before,
                2,
            )
        if target[1].partition(".")[0] in _OTHER_MODULES or target[1] in _OTHER_MODULES:
            return None
        words = words[index + 1 :]
    elif not target or target[0] == "-c" or not re.search(r"\.py$|\$", target[0]):
        return None
    else:
        words = words[index:]
    known = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    return Training("python", words, before, 1 if known & (trainer.MARKS | trainer.READ | {"config"}) else 0)


def _read(training: Training, reading: Reading) -> None:
    """Record the facts of the launcher's flags, then of the script's arguments and the files that they name."""
    starter, words = training.starter, training.words
    script, is_sft = "", starter == "trl"
    if starter in ("accelerate-launch", "torchrun", "deepspeed"):
        flags, words = starting.flags_of(words)
        {
            "accelerate-launch": starting.of_accelerate,
            "torchrun": starting.of_torchrun,
            "deepspeed": starting.of_deepspeed,
        }[starter](flags, reading)
    if starter == "axolotl" and "--" in words:  # arguments of the launcher that axolotl starts
        flags, _ = starting.flags_of(words[words.index("--") + 1 :])
        words = words[: words.index("--")]
        way = starting.of_torchrun if "torchrun" in words else starting.of_accelerate
        way(flags, reading)
        words = [word for word in words if word not in ("--launcher", "torchrun", "accelerate")]
    if starter not in ("axolotl", "llamafactory-cli") and words:
        script, words = words[0], words[1:]
    starter = _STARTING_MODULES.get(script, starter)
    stem = PurePath(script).stem
    if _OTHER_LOSSES.search(stem) is not None:
        text = (
            "learns by another loss than cross entropy, which is all launcher has; the nearest is "
            "supervised fine-tuning"
        )
        return reading.refuse("script", script, text)
    if script and not is_sft:
        text = "launcher brings its own loop; `launcher run --script` would start yours"
        reading.ignore("script", script, text)
    _arguments(words, is_sft or re.search(r"(?:^|_)sft$", stem) is not None, starter, script, reading)
    return None


def _arguments(words: list[str], is_sft: bool, starter: str, script: str, reading: Reading) -> None:
    """Record the facts of a script's arguments; they override the keys of a file that they name."""
    named, positional = _split(words)
    file = ""
    for word in [
        *positional,
        *(str(named.pop(key)) for key in ("config", "config_yaml") if _is_file(str(named.get(key)))),
    ]:
        key, equals, value = word.partition("=")
        if equals and starter == "llamafactory-cli":
            named[key] = value
        elif "$" in word:
            text = (
                "the shell fills this in; nothing is executed here, so what stands in it is not read: "
                "import the file that it names too"
            )
            reading.fill_in("(an argument)", word[:60], text)
            reading.is_partial = True
        elif _is_file(word) and not file:
            file = word
        else:
            reading.cannot_say("(an argument)", word[:60], "launcher knows no argument without a name")
    content = starting.without_variables(named, reading)
    reading.is_partial |= not {"config", "config_yaml"}.isdisjoint(reading.unknown)
    if file:
        reading.follow.append(file)
        reading.overrides[file] = (content, is_sft)
    else:
        read_arguments(content, is_sft, starter, reading)
        if script and not reading.tool:
            text = (
                "its own defaults are not known here: where no argument says them, launcher's stand "
                "(launcher validate shows the job)"
            )
            reading.fill_in("script", script, text)


def read_arguments(content: dict[str, Any], is_sft: bool, starter: str, reading: Reading) -> None:
    """Record the facts of named arguments, as the tool that they are for reads them."""
    if starter == "llamafactory-cli" or {"finetuning_type", "cutoff_len", "template"} & content.keys():
        llama_factory.read(content, reading)
    elif starter == "axolotl" or "base_model" in content:
        axolotl.read(content, reading)
    else:
        # transformers' own parser has `--no_NAME` for flags that are true by default.
        off = {
            key.removeprefix("no_"): False
            for key in content
            if key.startswith("no_") and content[key] is True and key != "no_cuda"
        }
        trainer.read(
            {key: value for key, value in content.items() if key.removeprefix("no_") not in off} | off,
            reading,
            is_sft,
        )


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml", ".json")) and "$" not in word


def _split(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split words into named arguments, and the words before the first name. The forms are `--name value`,
    `--name=value`, `--name` (true) and `--name a b` (a list)."""
    named: dict[str, Any] = {}
    positional: list[str] = []
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            named[name] = value if equals else True
            name = "" if equals else name
        elif name:
            before = named[name]
            named[name] = (
                word if before is True else [*before, word] if isinstance(before, list) else [before, word]
            )
        else:
            positional.append(word)
    return named, positional
