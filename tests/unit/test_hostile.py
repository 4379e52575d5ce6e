"""Files that are written to hold their reader up, and secrets on every way out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import report
from launcher.cli.output import print_json
from launcher.errors import ConfigurationError, LauncherError
from launcher.importing.job import import_files
from launcher.job.load import load
from launcher.job.yaml_text import parse
from launcher.launch.command import write_command
from launcher.launch.run_setup import load_job
from launcher.plain_files import parse_json, read_bytes, read_json
from launcher.planner.model.model_sizes import wrong_sizes
from launcher.redaction import holds_secret, redact, redact_all, secret_arguments
from launcher.runs import failure, records
from launcher.runs.events import append, event, read

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
JOB = """
name: tiny
model: {name: org/model}
data: {train: {path: train.jsonl}, text: text}
"""


def bomb(levels: int) -> str:
    return "a0: &a0 [1, 1]\n" + "".join(
        f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}]\n" for level in range(1, levels)
    )


HELD_UP = {
    "aliases": (bomb(60), "more than 10,000 values, aliases filled in"),
    "merge keys": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60)),
        "10,000 values",
    ),
    "many values": (f"a: [{'1,' * 20_000}]", "more than 10,000 values"),
    "brackets": ("a: " + "[" * 60_000, "nested more than 100 levels deep"),
    "levels": ("\n".join(" " * level + "a:" for level in range(300)), "nested more than 100 levels deep"),
    "a chain of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)),
        "levels deep",
    ),
    "itself": ("a: &a [*a]", "refers to itself"),
    "a number in base 60": ("a: " + ":".join(["59"] * 40_000), "a whole number beyond any sense"),
    "a float in base 60": ("a: " + ":".join(["59"] * 40_000) + ".5", "more than 100 characters"),
    "digits": ("a: " + "9" * 100_000, "a whole number beyond any sense"),
    "hexadecimal digits": ("a: 0x" + "f" * 100_000, "a whole number beyond any sense"),
    "a large number": ("a: 9223372036854775808", "the largest is 9,223,372,036,854,775,807"),
    "half a character": ('a: "\\ud800"', "half a character"),
    "a zero byte": ('a: "\\0"', "a zero byte"),
    "a long text": ("a: '" + "x y " * 40_000 + "'", "more than 128 KiB"),
    "a tag of another kind": ("a: !!timestamp x", "not YAML"),
    "a class": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", HELD_UP)
def test_yaml_that_would_hold_its_reader_up_is_refused_at_once(name: str, tmp_path: Path) -> None:
    text, said = HELD_UP[name]
    began = time.process_time()
    with pytest.raises(ConfigurationError, match=said):
        parse(text, "job.yaml")
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    with pytest.raises(
        ConfigurationError, match=f"accelerate.yaml.*{said}" if "KiB" not in said else "128 KiB"
    ):
        import_files([path])
    assert time.process_time() - began < 20, (
        "of the processor's time; it is about one, and without bounds hours"
    )


def test_aliases_that_are_meant_are_read() -> None:
    assert parse("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "job.yaml")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 150 + "1" + "}" * 150, "[" * 101 + "]" * 101])
def test_json_that_is_nested_beyond_any_sense_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")
    assert parse_json("[" * 99 + "]" * 99)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, said in (
        (tmp_path / "pipe", "is a pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / "folder", "Is a directory"),
    ):
        with pytest.raises(OSError, match=said):
            read_bytes(path)
        with pytest.raises(OSError, match=said):
            list(read(path))
        with pytest.raises(OSError, match=r"is a|Is a|Illegal"):
            append(path, {"a": 1})
    (tmp_path / "long").write_bytes(b" " * 2000)
    with pytest.raises(OSError, match="is larger than 1 KiB"):
        read_bytes(tmp_path / "long", 1 << 10)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "no-such", "n_layers": 10**6}, "n_layers"),
        ({"model_type": "llama", "vocab_size": 10**18}, "vocab_size"),
        ({"text_config": {"num_hidden_layers": 1e9}}, "text_config.num_hidden_layers"),
        ({"model_type": "mixtral", "num_local_experts": 10**7}, "num_local_experts"),
        ({"whatever": 10**400}, "whatever"),
    ],
)
def test_a_config_beyond_any_sense_is_refused_by_key(config: dict[str, Any], key: str) -> None:
    (problem,) = wrong_sizes(config)
    assert problem.key == key and "beyond any sense; write at most" in problem.reason


def test_the_largest_models_there_are_are_not_beyond_any_sense() -> None:
    large = {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "vocab_size": 262_144,
        "max_position_embeddings": 10_485_760,
        "n_experts": 512,
    }
    assert wrong_sizes({**large, "time_step_limit": float("inf"), "rope_theta": 1e7, "mask": -3.4e38}) == []


@pytest.mark.parametrize(
    "override",
    ["batch.global_batch_size=1000000000000", "cluster.nodes=100000", "cluster.nodes=1-100000",
    "cluster.ranks_per_node=1000000000",
     "data.num_workers=1000000", "training.max_steps=9000000000000000000", "training.epochs=.inf",
     "training.learning_rate=.inf",
     "cluster.grace=1e300", "data.max_length=9000000000000000000", "parallel.replicate=1000000000",
     "model.adapter.rank=1000000000"],
)  # fmt: skip
def test_numbers_beyond_any_sense_are_refused_by_key(override: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path / "job.yaml", [override])
    assert override.partition("=")[0] in {problem.key for problem in caught.value.problems}


SECRETS = [
    TOKEN,
    "see hf_abcdefghijklmnopqrstuvwxyz, there",
    "https://me:hunter2@host/x",
    "export WANDB_API_KEY=0123456789abcdef",
    "ALL,HF_TOKEN=hunter22a",
    "--hub_token hunter22a",
    "--password=hunter22a",
    "curl -H 'Authorization: Bearer abcdefghijklmnop1234'",
    "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "ASIAIOSFODNN7EXAMPLE",
]
ORDINARY = [
    "export HF_TOKEN=$(cat ~/.token)", "HF_TOKEN=$HF_TOKEN", "HF_TOKEN_PATH=/home/me/token",
    "TOKENIZERS_PARALLELISM=false", "max_tokens=9",
    "NUM_TOKENS=many_words", "--token-type=word-piece", "pad_token=<|endoftext|>", "org/hf_model",
    "git@github.com:org/x.git",
    "the token of a step", "task-learn-classifier-base",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_known_and_hidden(text: str) -> None:
    assert holds_secret(text) and "***" in redact(text, {})
    assert not holds_secret(redact(text, {}).replace("***", ""))


@pytest.mark.parametrize("text", ORDINARY)
def test_what_is_no_secret_stays(text: str) -> None:
    assert not holds_secret(text) and redact(text, {}) == text


def test_the_values_of_this_environment_are_known() -> None:
    environment = {
        "MY_SECRET": "correct horse battery",
        "SSH_AUTH_SOCK": "/tmp/agent.1",
        "SHORT_KEY": "abc",
        "PLAIN": "something else",
    }
    said = "correct horse battery, /tmp/agent.1, abc, something else"
    assert redact(said, environment) == "***, /tmp/agent.1, abc, something else"


def test_no_secret_leaves_by_any_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "correct horse battery")
    said = f"cannot reach https://me:hunter2@host with {TOKEN} or correct horse battery"
    variables = {
        "NCCL_COMMENT": TOKEN,
        "LAUNCHER_X": "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "LAUNCHER_Y": "correct horse battery",
        "PATH": "/bin",
    }
    write_command(
        tmp_path / "command.json",
        ["train.py", "--hub_token", TOKEN],
        {**variables, "MY_PASSWORD": "correct horse battery"},
    )
    event(tmp_path / "events.jsonl", "noted", text=said, list=[said], deep={"a": said, said: 1})
    (tmp_path / "attempt").mkdir()
    failure.record(tmp_path / "attempt", 0, RuntimeError(said))
    report(LauncherError(said))
    print_json({"a": said, "b": [said], said: 1})
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    seen = capsys.readouterr()
    for text in (written, seen.out, seen.err):
        assert "***" in text and not any(
            secret in text for secret in (TOKEN, "hunter2", "ghp_a", "correct horse")
        )
    assert redact_all([1, None, 2.5, True]) == [1, None, 2.5, True]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["train.py", "--hub_token", "hunter22a"], ["--hub_token"]),
        (["train.py", "--api-key=hunter22a", "x", TOKEN], ["--api-key", "an argument"]),
        (["train.py", "--tokenizer", "bert-base", "--max_tokens", "4096", "--hub_token", "$HF_TOKEN"], []),
    ],
)
def test_a_scripts_arguments_hold_no_secret(words: list[str], found: list[str], tmp_path: Path) -> None:
    assert secret_arguments(words) == found
    if found:
        with pytest.raises(ConfigurationError, match="looks like a secret") as caught:
            load_job(None, [], (str(tmp_path / "train.py"), *words[1:]))
        assert "hunter22a" not in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cluster.setup", "[export WANDB_API_KEY=0123456789abcdef]"),
        ("cluster.container", "{image: a.sif, options: [--env, HF_TOKEN=hunter22a]}"),
        ("cluster.sbatch", "{export: 'ALL,HF_TOKEN=hunter22a'}"),
        ("cluster.environment", "{HF_TOKEN: hunter22a}"),
    ],
)
def test_a_job_file_and_a_profile_hold_no_secret_by_name(key: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "site.yaml").write_text(f"cluster: {{{key.removeprefix('cluster.')}: {value}}}\n")
    for overrides in ([f"{key}={value}"], ["cluster.profile=./site.yaml"]):
        with pytest.raises(ConfigurationError, match=rf"{key}.*looks like a secret") as caught:
            load(tmp_path / "job.yaml", overrides)
        assert "hunter22a" not in str(caught.value) and "0123456789abcdef" not in str(caught.value)


def test_an_import_shows_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "trainer.json"
    path.write_text(
        json.dumps({"model_name_or_path": "x/y", "output_dir": TOKEN, "learning_rate": 1e-5, "resume": TOKEN})
    )
    made = import_files([path])
    assert TOKEN not in made.text and not any(TOKEN in str(remark) for remark in made.remarks)
    path.write_text(
        json.dumps({"model_name_or_path": f"https://me:hunter2@host/{TOKEN}", "output_dir": "out"})
    )
    with pytest.raises(ConfigurationError, match="looks like a secret") as caught:
        import_files([path])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ['{"event": 3}', '{"event": "evaluated", "metrics": {"loss": "x"}, "step": 1, "time": 1}',
    '{"event": "evaluated"}', '{"time": NaN}',
     '{"event": "failed", "failure": {}}', '{"loss": [], "step": 1}', '{"step": true}', '{"step": 1e400}',
     '[]', "3", "[" * 100_000, "{",
     '{"event": "prepared", "role": "train"}', '{"time": 1e300}', '{"total_steps": "many"}'],
)  # fmt: skip
def test_a_line_of_other_kinds_is_no_record(line: str) -> None:
    assert records.parse(line) is None


def test_a_record_of_other_kinds_is_none() -> None:
    with pytest.raises(TypeError, match="rank of a Failure is a str"):
        records.made_of(failure.Failure, {"rank": "0"})
    with pytest.raises(TypeError, match="list in the place of a Failure"):
        records.made_of(failure.Failure, [])
