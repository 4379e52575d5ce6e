"""Scripts as people write them: which command trains, what its words are, and what Slurm is asked for.
Nothing is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.errors import ConfigurationError
from launcher.importing import shell, slurm
from launcher.importing.job import Imported, import_files


def imported(folder: Path, text: str, name: str = "t.sh") -> Imported:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return import_files([path])


def remarked(made: Imported) -> dict[str, str]:
    return {remark.said: remark.kind for remark in made.remarks}


WORDS: list[tuple[str, list[str]]] = [
    ("torchrun t.py", ["torchrun", "t.py"]),
    (
        "A=1 B='x y' torchrun t.py --a $B",
        ["torchrun", "t.py", "--a", "$B"],
    ),  # set for the command alone: not the shell's
    ('N="a b"\nrun $N "$N" \'$N\'', ["run", "a", "b", "a b", "$N"]),
    ("N=4\nrun $((N * 2)) $((N*M))", ["run", "8", "$((N*M))"]),
    ("run ${N:-5} ${M}", ["run", "5", "${M}"]),
    ("N=7\nrun ${N:-5}", ["run", "7"]),
    ("A=(--x 1   # why\n  --y 'b c'\n)\nrun \"${A[@]}\" z", ["run", "--x", "1", "--y", "b c", "z"]),
    ('A="--x 1"\nA+=" --y 2"\nrun $A', ["run", "--x", "1", "--y", "2"]),
    ("run a \\\n  --b 2 > log 2>&1 &", ["run", "a", "--b", "2"]),
    ("run --b 2 2> errors | tee log", ["run", "--b", "2"]),
    ("run a # not b", ["run", "a"]),
    ("run a#b '# c'", ["run", "a#b", "# c"]),
    ("if true; then run a; fi", ["run", "a"]),
    ("for x in 1 2; do run $x; done", ["run", "$x"]),
    ("if true; then L=1; else L=2; fi\nrun $L", ["run", "$L"]),  # which one, only the shell knows
    ("f() {\n  run a\n}\nf", ["run", "a"]),
    ("cd x && run a || exit 1", ["run", "a"]),
    ("bash -c 'run a'", ["run", "a"]),
    ("X='run a'\nbash -lc \"$X b\"", ["run", "a", "b"]),
    ("X='run \"a b\"'\neval $X", ["run", "a b"]),
    ("bash <<EOF\nrun a\nEOF", ["run", "a"]),
    ("cat > run.txt <<'EOF'\nrun wrong\nEOF\nrun a", ["run", "a"]),
    ("read -r -d '' X <<EOF\n--a 1\n --b 2\nEOF\nrun $X", ["run", "--a", "1", "--b", "2"]),
    ("H=$(hostname -s | head -n 1)\nrun --h $H:1", ["run", "--h", "$(hostname -s | head -n 1):1"]),
    ("run `date` x", ["run", "`date`", "x"]),
    ("P=$P:x\nrun $P", ["run", "$P:x"]),
    ("run \"it's\" 'a\"b'", ["run", "it's", 'a"b']),
    ("X='a\nb'\nrun \"$X\"", ["run", "a\nb"]),
    ("# a comment goes on no further \\\nrun a", ["run", "a"]),
    (
        "run --a 1 \\\n  # --b 2 \\\n  --c 3",
        ["run", "--a", "1"],
    ),  # what follows the comment is another command
    ("run --a 1 > >(tee log) 2> >(tee errors >&2)", ["run", "--a", "1"]),
    ("N=1\nunset N\nrun $N", ["run", "$N"]),
    ("echo 'no <<EOF here'\nrun a", ["run", "a"]),
    ("ssh host 'cd x && run a'", ["run", "a"]),
]


@pytest.mark.parametrize(("text", "words"), WORDS, ids=[str(index) for index in range(len(WORDS))])
def test_a_command_is_split_as_the_shell_splits_it(text: str, words: list[str]) -> None:
    found = [command for command in shell.parse(text).commands if command[0] in ("run", "torchrun")]
    assert found == [words]


@pytest.mark.parametrize("text", ["run 'a", 'run "a', "A=(1 2\nrun"])
def test_an_open_quote_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="left open"):
        shell.parse(text)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="aN= \n$(){}[]'\"\\`#;&|<>-1*/@!?:,", max_size=60))
def test_no_text_ends_in_a_traceback(text: str) -> None:
    try:
        shell.parse(text)
    except ValueError as error:
        assert str(error)


TRAINS: list[tuple[str, dict[str, Any]]] = [
    ('srun bash -c "torchrun --nnodes 2 --nproc_per_node 4 t.py --max_steps 3"',
    {"cluster": {"nodes": 2, "gpus_per_node": 4}}),
    ('export L="accelerate launch \\\n --num_processes 4 \\\n "\nS="t.py --max_steps 3"\nsrun $L $S',
    {"cluster": {"gpus_per_node": 4}}),
    ("module load python\npip install deepspeed\npython prepare.py\ntorchrun --nproc_per_node=2 t.py",
    {"cluster": {"gpus_per_node": 2}}),
    ("echo python train.py\npython prepare.py\npython t.py --max_steps 3", {"training": {"max_steps": 3}}),
    ("python -m venv env\npython -m t --max_steps 3", {"training": {"max_steps": 3}}),
    ("CUDA_VISIBLE_DEVICES=0 nohup uv run torchrun --nproc_per_node=2 t.py",
    {"cluster": {"gpus_per_node": 2}}),
    ("singularity exec --nv i.sif bash -c 'python -u t.py --max_steps 3'", {"training": {"max_steps": 3}}),
    ("deepspeed --include localhost:0,1,2,3 t.py", {"cluster": {"gpus_per_node": 4}}),
    ("deepspeed --include=a:0,1@b:2,3 t.py", {"cluster": {"nodes": 2, "gpus_per_node": 2}}),
    ("deepspeed -i a:0,1@b:2,3 --master_port 1 t.py", {"cluster": {"nodes": 2, "gpus_per_node": 2}}),
    ("deepspeed --num_nodes 2 --num_gpus 8 t.py", {"cluster": {"nodes": 2, "gpus_per_node": 8}}),
    ("python -m torch.distributed.launch --nproc_per_node=2 --use_env t.py --max_steps 3",
    {"cluster": {"gpus_per_node": 2}}),
    ("srun -N 2 --gres=gpu:4 --kill-on-bad-exit=1 python t.py --max_steps 3",
    {"cluster": {"nodes": 2, "gpus_per_node": 4}}),
    ("accelerate launch --num_processes 2 --gradient_accumulation_steps 2 t.py " "--per_device_train_batch_size 3",
     {"batch": {"micro_batch_size": 3, "global_batch_size": 12}}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), TRAINS, ids=[str(index) for index in range(len(TRAINS))])
def test_the_command_that_trains_is_found(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    made = imported(tmp_path, text)
    assert {key: made.content[key] for key in expected} == expected


SLURM = """#!/bin/bash
#SBATCH -J my-run
#SBATCH --nodes 2
#SBATCH --gres=gpu:a100:4,tmpdisk:10
#SBATCH --ntasks-per-node=1 --cpus-per-task=32
#SBATCH -t 1-12:30:00
#SBATCH -p gpu,long   # two of them
#SBATCH --account=me
#SBATCH --constraint="a100|h100"
#SBATCH --exclusive
#SBATCH --no-requeue
#SBATCH --output=logs/%j.out
#SBATCH --hint=nomultithread
#SBATCH --array=0-3
#SBATCH --qos=$QOS
srun torchrun --nnodes $SLURM_NNODES --nproc_per_node 4 --rdzv_endpoint $H:1 t.py --per_device_train_batch_size 2 --seed $S
"""


def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    made = imported(tmp_path, SLURM, "job.slurm")
    assert made.content["name"] == "my-run"
    assert made.content["cluster"] == {
        "nodes": 2, "gpus_per_node": 4, "gpu_type": "a100", "time_limit": 131_400, "partition": "gpu,long",
        "account": "me",
        "constraint": "a100|h100", "exclusive": True, "requeue": False, "cpus_per_node": 32,
        "sbatch": {"hint": "nomultithread"},
    }  # fmt: skip
    assert made.content["batch"]["global_batch_size"] == 16
    found = remarked(made)
    assert found["#SBATCH --array"] == "cannot be said"
    assert found["#SBATCH --qos"] == "fill in"
    assert found["--nnodes"] == "changes meaning"  # #SBATCH says it
    assert found["--rdzv_endpoint"] == "ignored"
    assert found["--seed"] == "fill in"
    assert "seed" not in made.content["training"]  # not left out there: the shell knows it


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("--gpus=16 -N 2", {"nodes": 2, "gpus_per_node": 8}),
        ("--gpus-per-task=1 --ntasks=8 --nodes=2", {"nodes": 2, "gpus_per_node": 4}),
        ("--gpus-per-task=2 --ntasks-per-node=4", {"gpus_per_node": 8}),
        ("--gpus-per-node=h100:8 -N2", {"nodes": 2, "gpus_per_node": 8, "gpu_type": "h100"}),
        ("--nodes=2-4 --gres=gpu:8", {"nodes": "2-4", "gpus_per_node": 8}),
        ("--gres=gpu:a100:4(S:0-1)", {"gpus_per_node": 4, "gpu_type": "a100"}),
        ("-c 8 --ntasks-per-node=4", {"cpus_per_node": 32}),
    ],
)
def test_ways_to_ask_slurm_for_gpus_and_cores(lines: str, expected: dict[str, Any], tmp_path: Path) -> None:
    cluster = imported(tmp_path, f"#!/bin/sh\n#SBATCH {lines}\nsrun python t.py --max_steps 1\n").content[
        "cluster"
    ]
    assert {key: cluster[key] for key in expected} == expected


def test_slurm_reads_no_directive_behind_a_command(tmp_path: Path) -> None:
    made = imported(tmp_path, "#!/bin/sh\n\n# why\n#SBATCH -p a\ncd x\n#SBATCH -p b\ntorchrun t.py\n")
    assert made.content["cluster"] == {"partition": "a"}


@pytest.mark.parametrize(
    "text",
    [
        "N=2\nsbatch --partition=gpu <<EOF\n#!/bin/sh\n#SBATCH --nodes=$N\nsrun torchrun "
        "--nproc_per_node 4 t.py\nEOF",
        "sbatch -p gpu -N 2 --wrap 'srun torchrun --nproc_per_node 4 t.py'",
        'sbatch -p gpu -N 2 --wrap="torchrun --nproc_per_node 4 t.py"',
    ],
)
def test_what_is_handed_to_sbatch_on_the_spot(text: str, tmp_path: Path) -> None:
    assert imported(tmp_path, text).content["cluster"] == {"nodes": 2, "gpus_per_node": 4, "partition": "gpu"}


def test_slurms_numbers_and_those_of_the_command_can_conflict(tmp_path: Path) -> None:
    made = imported(
        tmp_path, "#!/bin/sh\n#SBATCH --gpus-per-node=8\ntorchrun --nproc_per_node 4 t.py\n", "job"
    )
    assert made.content["cluster"] == {"gpus_per_node": 4, "gpu_option": "gpus-per-node"}
    assert remarked(made)["#SBATCH --gpus-per-node"] == "conflict"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:30", 1830),
        ("2:30:00", 9000),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-00:00:01", 86_401),
        ("UNLIMITED", None),
    ],
)
def test_slurms_times(text: str, seconds: float | None) -> None:
    assert slurm.seconds_of(text) == seconds


def test_the_shells_own_numbers_make_no_batch(tmp_path: Path) -> None:
    text = (
        "torchrun --nproc_per_node 2 t.py --output_dir o --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps $A"
    )
    made = imported(tmp_path, text)
    assert made.content["batch"] == {"micro_batch_size": 4}
    assert remarked(made)["--gradient_accumulation_steps"] == "fill in"
    made = imported(
        tmp_path,
        "torchrun --nnodes $N --nproc_per_node 2 t.py --output_dir o --per_device_train_batch_size 4",
    )
    assert made.content["batch"] == {"micro_batch_size": 4} and made.content["cluster"] == {
        "gpus_per_node": 2
    }
    assert remarked(made)["--nnodes"] == "fill in"


def test_a_file_of_hosts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=4\nb slots=4  # spare\n\nc slots=2\n")
    made = imported(tmp_path, "deepspeed --hostfile hosts --exclude c t.py")
    assert made.content["cluster"] == {"nodes": 2, "gpus_per_node": 4}
    made = imported(tmp_path, "deepspeed --hostfile hosts t.py")
    assert made.content["cluster"] == {"nodes": 3, "gpus_per_node": 2}
    assert remarked(made)["--hostfile"] == "cannot be said"
    assert remarked(imported(tmp_path, "deepspeed --hostfile elsewhere t.py"))["--hostfile"] == "fill in"
    assert remarked(imported(tmp_path, "deepspeed --exclude a:1 t.py"))["--exclude"] == "fill in"
    assert remarked(imported(tmp_path, "deepspeed --include a t.py"))["--include"] == "fill in"


def test_a_file_and_what_stands_in_place_of_its_keys(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "stage: sft\nfinetuning_type: full\ndataset: a\nlearning_rate: 1.0e-5\nmax_steps: 3\noutput_dir: o\n"
    )
    made = imported(tmp_path, "FORCE_TORCHRUN=1 llamafactory-cli train c.yaml learning_rate=3e-5")
    assert made.content["training"]["learning_rate"] == 3e-5 and made.content["training"]["max_steps"] == 3
    assert "adapter" not in made.content["model"]
    assert remarked(made)["learning_rate"] == "conflict"
    (tmp_path / "r.yaml").write_text("model_name_or_path: m\noutput_dir: o\nlearning_rate: 1.0e-5\n")
    for line in (
        "trl sft --config r.yaml --max_steps 4",
        "accelerate launch scripts/run_sft.py r.yaml --max_steps=4",
    ):
        made = imported(tmp_path, line)
        assert made.content["training"] == {
            "learning_rate": 1e-5,
            "max_steps": 4,
            "schedule": "linear",
            "warmup": 0.0,
            "seed": 42,
        }
        assert made.content["precision"] == "bf16"  # TRL's default
    (tmp_path / "a.yml").write_text("base_model: m\nmicro_batch_size: 1\nlearning_rate: 1.0e-5\n")
    made = imported(tmp_path, "axolotl train a.yml --launcher torchrun -- --nproc_per_node=4")
    assert made.content["cluster"] == {"gpus_per_node": 4} and made.content["model"]["name"] == "m"


def test_of_a_file_that_is_not_here_nothing_is_known_to_be_left_out(tmp_path: Path) -> None:
    made = imported(tmp_path, "python run_sft.py nowhere.yaml --learning_rate=1e-5 --output_dir o")
    assert made.content["training"] == {"learning_rate": 1e-5}
    made = imported(tmp_path, "accelerate launch --config_file nowhere.yaml t.py --output_dir o")
    assert "precision" not in made.content and made.content["training"]["epochs"] == 3.0
    made = imported(tmp_path, "accelerate launch t.py --config $FILE --output_dir o --learning_rate 1e-5")
    assert made.content["training"] == {"learning_rate": 1e-5}


def test_a_scripts_own_names_are_left_out_with_the_nearest_key(tmp_path: Path) -> None:
    made = imported(tmp_path, "torchrun --nproc_per_node 2 t.py --lr 3e-4 --epochs 2 --batch-size 8")
    assert "training" not in made.content and "batch" not in made.content
    found = {remark.said: remark.text for remark in made.remarks if remark.kind == "cannot be said"}
    assert found.keys() == {"lr", "epochs", "batch_size"} and "training.learning_rate" in found["lr"]


def test_two_trainings_are_two_jobs(tmp_path: Path) -> None:
    made = imported(tmp_path, "torchrun --nproc_per_node 2 a.py\ntorchrun --nproc_per_node 4 b.py\n")
    assert made.content["cluster"] == {"gpus_per_node": 2}
    assert remarked(made)["command"] == "cannot be said"


def test_the_scripts_own_default_is_taken_and_named(tmp_path: Path) -> None:
    made = imported(tmp_path, "python t.py --learning_rate ${LR:-1e-4} --output_dir o")
    assert made.content["training"]["learning_rate"] == 1e-4
    assert remarked(made)["${LR:-1e-4}"] == "chosen"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("srun $LAUNCHER t.py", "what is in $LAUNCHER"),
        ("bash scripts/train.sh", "scripts/train.sh is called: import that"),
        (
            "pip install deepspeed\npython -m pip install torch\npython -c 'x'\naccelerate config\n",
            "no line here starts a training",
        ),
        ("torchrun dpo.py --output_dir o", "another loss"),
        ("trl grpo --output_dir o", "another loss"),
        ("#SBATCH --time=soon\ntorchrun t.py", "a time as Slurm has it"),
        ("python t.py --a 'b", "left open"),
    ],
)
def test_a_script_that_cannot_be_read(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        imported(tmp_path, text)
    assert said in str(caught.value)


def test_nothing_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    imported(
        tmp_path,
        f'X=$(touch {marker})\nbash -c "torchrun t.py --a `touch {marker}` --b $((1)) --c '
        f'${{Y:-$(touch {marker})}}"\n',
    )
    assert not marker.exists()
