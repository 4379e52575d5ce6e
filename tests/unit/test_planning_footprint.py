"""The memory model without torch: shadows free what nothing holds, and a footprint grows and shrinks with
what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigurationError
from launcher.planner.forecast import forecast_of
from launcher.planner.limits import MOMENT_TABLES
from launcher.planner.memory import operators as ops
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.footprint import Footprint
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.memory.profiles import Unknown
from launcher.planner.memory.program import Batch, Weight
from launcher.planner.memory.symbolic import (
    Meter,
    Parameter,
    Storage,
    SymbolicTensor,
    backward,
    checkpoint,
    new,
)
from launcher.planner.plan import Plan
from launcher.planner.target import Target
from tests.training.plans import deepspeed, plan_of

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def chain(meter: Meter, mode: str) -> SymbolicTensor:
    """Two layers of a matrix product and an activation, 10 rows of 8 fp32 numbers."""
    table = Parameter(80)
    hidden = ops.embedding(new(meter, 10, 8), 10, 8, 4, table)
    for _ in range(2):
        hidden = checkpoint(meter, mode, lambda x: ops.pointwise(ops.linear(x, 8, 8, Parameter(64))), hidden)
    return hidden


def test_shadows_are_gone_when_nothing_holds_them() -> None:
    meter = Meter()
    first = Storage(meter, 100)
    second = Storage(meter, 50)
    del first
    assert (meter.live, meter.peak) == (50, 150)
    del second
    assert meter.live == 0


@pytest.mark.parametrize(("mode", "kept"), [("none", 5 * 320), ("full", 3 * 320), ("selective", 5 * 320)])
def test_what_is_kept_for_the_backward_pass(mode: str, kept: int) -> None:
    """Of each layer its input, the product and the activation; with full checkpointing its input alone."""
    meter = Meter()
    result = chain(meter, mode)
    assert meter.live == kept
    backward(result)
    del result
    assert meter.live == 0


def footprint(
    config: dict[str, Any] = LLAMA, world: int = 8, lengths: tuple[int, ...] = (4096,), **changes: Any
) -> Footprint:
    plan = plan_of(
        Path("model"),
        world,
        **{"mesh__device": "cuda", "precision": "bf16", "mesh__ranks_per_node": 8} | changes,
    )
    formulas = formulas_of(plan, config)
    assert formulas is not None
    return Estimator(plan, formulas, Batch(lengths, padded=plan.attention != "packed")).footprint()


def test_states_are_sixteen_bytes_of_a_parameter_over_the_ranks() -> None:
    """Parameter and both moments; the fourth, the gradient, comes and goes (Rajbhandari et al. 2020, arXiv
    1910.02054, section 3.1)."""
    parameters = 8_030_261_248  # Llama 3.1 8B, by its model card
    assert footprint().phase("loading").peak == parameters * 12 // 8
    sgd = {"training__optimizer": "sgd"}
    assert footprint(**sgd).phase("loading").peak == parameters * 8 // 8


@pytest.mark.parametrize("key", [{"training__ema": {"decay": 0.99}}, {"training__l2_sp": {"alpha": 1}}])
def test_an_average_or_the_start_is_four_bytes_more_of_each_that_trains(key: dict[str, Any]) -> None:
    parameters = 8_030_261_248
    averaged = footprint(**key)
    assert averaged.phase("loading").peak == parameters * 16 // 8
    assert averaged.phase("steady step").peak - footprint().phase("steady step").peak == parameters * 4 // 8
    weighed = footprint(training__l2_sp={"alpha": 1, "fisher": "any"})
    assert weighed.phase("loading").peak == parameters * 20 // 8


def test_of_muon_the_matrices_of_the_layers_have_one_number_of_state() -> None:
    """By hand: of Llama 3.1 8B all but the two matrices of the vocabulary and the norms."""
    parameters, matrices = 8_030_261_248, 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    muon = footprint(training__optimizer="muon", world=1)
    assert muon.phase("loading").peak == 12 * parameters - 4 * matrices


def test_moments_in_bf16_are_four_bytes_of_each_that_trains_fewer() -> None:
    parameters = 8_030_261_248
    halved = footprint(training__moments="bf16")
    assert halved.phase("loading").peak == parameters * 8 // 8
    zero = {"training__moments": "bf16", **deepspeed(3)}
    wide, half = (footprint(**{**zero, "training__moments": one}) for one in ("fp32", "bf16"))
    assert wide.phase("loading").peak - half.phase("loading").peak == parameters * 4 // 8


def test_moments_in_8_bits_are_two_bytes_of_an_element_and_two_scales_of_a_block() -> None:
    """By hand: of Llama 3.1 8B on 8 ranks all but the norms, whose rows are whole blocks of 256."""
    parameters, norms = 8_030_261_248, 65 * 4096
    matrices = parameters - norms
    narrow = footprint(training__moments="8bit").phase("loading").peak
    assert narrow == (4 * parameters + 8 * norms + 2 * matrices + 8 * matrices // 256) // 8 + MOMENT_TABLES
    uneven = Weight("any", (30, 300), in_bytes=True)
    assert 8 * uneven.shard(4) - uneven.spared(4) == 2 * 8 * 300 + 8 * 8 * 2
    whole = footprint(training__moments="8bit", world=1).phase("steady step")
    assert whole.peak - footprint(world=1).phase("steady step").peak == MOMENT_TABLES - (
        6 * matrices - 8 * matrices // 256
    ), "what widens them is less than the peak of the passes"


def test_of_adafactor_matrices_have_a_number_for_each_row_and_column() -> None:
    """By hand: of Llama 3.1 8B on 8 ranks, which share the rows and have all columns each."""
    parameters, norms, vocabulary = 8_030_261_248, 65 * 4096, 2 * 128256
    rows = vocabulary + 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    columns = 2 * 4096 + 32 * (4 * 4096 + 2 * 4096 + 14336)
    of_rank = footprint(training__optimizer="adafactor").phase("loading").peak
    assert of_rank == 4 * (parameters + norms + rows) // 8 + 4 * columns
    whole = footprint(training__optimizer="adafactor", world=1).phase("loading").peak
    assert whole == 4 * (parameters + norms + rows + columns)


def test_more_recomputation_needs_less() -> None:
    peaks = [
        footprint(activation_checkpointing=mode).phase("steady step").peak
        for mode in ("none", "selective", "full")
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.5 * peaks[2]


def test_longer_samples_more_of_them_and_more_layers_need_more() -> None:
    one = footprint().highest.total
    assert footprint(lengths=(8192,)).highest.total > one
    # All samples of a row are attended at once: what tells two from one is that a position less is supervised.
    two, whole = footprint(lengths=(4096, 4096)).highest.total, footprint(lengths=(8192,)).highest.total
    assert two == pytest.approx(whole, rel=1e-5)
    assert footprint(LLAMA | {"num_hidden_layers": 64}).highest.total > one


def test_the_middle_layers_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    short = footprint().phase("steady step")
    monkeypatch.setattr("launcher.planner.memory.symbolic_program.MOST_LAYERS", 100)
    assert footprint().phase("steady step") == short


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_higher_stage_of_zero_needs_less(stage: int) -> None:
    sizes = {
        "reduce_bucket_size": 1 << 24,
        "allgather_bucket_size": 1 << 24,
        "prefetch_bucket_size": 1 << 24,
        "sub_group_size": 1 << 24,
    }
    options = deepspeed(stage)
    options["zero"] |= sizes | {"max_live_parameters": 1 << 31}
    made = footprint(activation_checkpointing="full", lengths=(512,), **options).phase("steady step").peak
    below = {1: 1 << 60, 2: 51 << 30, 3: 26 << 30}[stage]
    assert made < below


def test_frozen_parameters_have_neither_gradient_nor_state() -> None:
    all_trained, frozen = footprint(), footprint(model__freeze=("model.layers.*",))
    assert frozen.phase("loading").peak < 0.5 * all_trained.phase("loading").peak
    assert frozen.highest.total < all_trained.highest.total


@pytest.mark.parametrize(
    ("by_depth", "by_name"),
    [
        ({"layers": "all"}, ("model.layers.*",)),
        ({"layers": "0-7", "embeddings": True}, ("model.layers.[0-7].*", "model.embed_tokens.*")),
        ({"base": True}, ("model.*",)),
        ({"layers": "all but last 2"}, (*(f"model.layers.{i}.*" for i in range(30)),)),
    ],
)
def test_frozen_by_depth_is_frozen_by_name(by_depth: dict[str, Any], by_name: tuple[str, ...]) -> None:
    assert footprint(model__freeze=by_depth) == footprint(model__freeze=by_name)


def test_what_thaws_is_planned_as_if_it_trained_from_the_start() -> None:
    freeze = {"layers": "all", "embeddings": True}
    thaws = ({"at": "10%", "from": 20}, {"at": "20%", "from": 4})
    later = footprint(model__freeze=freeze, model__unfreeze=thaws)
    assert later == footprint(model__freeze={"layers": "0-3", "embeddings": True})
    with pytest.raises(ConfigurationError, match="the model has 32 repeated layers"):
        footprint(model__freeze={"layers": "0-40"})


def test_a_group_that_matches_nothing_is_refused_with_the_plan() -> None:
    group = {"parameters": ("clasifier.*",), "learning_rate": 1e-3}
    with pytest.raises(ConfigurationError, match="matches no parameter that trains; they look like"):
        footprint(training__groups=(group,))


def test_groups_of_the_optimizer_change_what_zero_copies_whole() -> None:
    """Of fp32 gradients a rank copies every parameter whole of which it has any part: more groups, more
    borders."""
    options = deepspeed(2) | {"precision": "fp32", "activation_checkpointing": "full", "lengths": (512,)}
    one, several = footprint(**options), footprint(training__layer_decay=0.9, **options)
    assert one.phase("loading") == several.phase("loading")
    assert several.highest.total != one.highest.total


def test_beside_an_adapter_the_weights_are_two_bytes_and_what_trains_sixteen() -> None:
    """By hand: of Llama 3.1 8B, rank 16 beside seven matrices of each layer (peft prints 41,943,040 trainable
    parameters)."""
    weights, hidden, keys, wide = 8_030_261_248, 4096, 1024, 14336
    trained = 32 * 16 * (2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + wide))
    assert trained == 41_943_040
    one = footprint(world=1, model__adapter={})
    assert one.phase("loading").peak == 2 * weights + 12 * trained
    assert footprint(model__adapter={}).phase("loading").peak == (2 * weights + 12 * trained) // 8
    # The largest is made whole in bf16, in fp64, and as four squares of its shorter side.
    made = footprint(model__adapter={"init": "pissa"}).phase("loading").peak
    assert made - footprint(model__adapter={}).phase("loading").peak == 10 * 4096 * 14336 + 32 * 4096**2
    full = footprint(world=1, model__adapter={"train_also": ("lm_head.*",)})
    assert full.phase("loading").peak == one.phase("loading").peak + 10 * 128256 * hidden


def test_on_one_rank_nothing_is_gathered_of_what_does_not_train() -> None:
    beside, whole = (
        footprint(world=1, lengths=(256,), **options).phase("evaluating")
        for options in ({"model__adapter": {}}, {})
    )
    assert beside.parts.get("gathered layers", 0) < 100 << 20
    assert whole.parts["gathered layers"] > 2 * 2 * 128256 * 4096  # the embeddings and the head


def test_an_adapter_keeps_what_goes_into_it() -> None:
    """The inputs of 7 adapted matrices, as if their own weights trained; of two matrices in attention one
    input alone, and less."""
    some = footprint(world=1, model__adapter={"targets": ("q_proj", "v_proj")}).phase("steady step").peak
    every = footprint(world=1, model__adapter={}).phase("steady step").peak
    assert some < every
    assert footprint(world=1, model__adapter={"rank": 64}).phase("steady step").peak > every
    assert footprint(world=1, model__adapter={"dropout": 0.1}).phase("steady step").peak > every


def test_layers_that_a_pattern_tells_apart_are_all_gone_through() -> None:
    first = footprint(world=1, model__adapter={"targets": ("model.layers.0.*",)}).phase("steady step").peak
    last = footprint(world=1, model__adapter={"targets": ("model.layers.31.*",)}).phase("steady step").peak
    assert last < first


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"targets": ("q_prj",)}, r"model.adapter.targets.*nearest are q_proj"),
        ({"targets": ("lm_head",)}, r"model.adapter.targets.*matches no linear layer that can have one"),
        ({"train_also": ("lm_haed.*",)}, r"model.adapter.train_also.*nearest are lm_head.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_before_a_start(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        footprint(model__adapter=adapter)


def test_an_evaluation_keeps_nothing_for_a_backward_pass() -> None:
    made = footprint()
    assert made.phase("evaluating").peak < 0.6 * made.phase("steady step").peak


def test_offloaded_state_is_in_the_hosts_memory() -> None:
    made = footprint(offload="parameters").phase("steady step")
    assert made.host == 8_030_261_248 * 16 // 8, "parameters, two moments and the gradients, all in fp32"
    assert "optimizer state" not in made.parts


def test_the_parts_add_up_to_the_peak() -> None:
    for phase in footprint().phases:
        assert sum(phase.parts.values()) == pytest.approx(phase.total, rel=0.001)


def test_unknown_architectures_and_configs_without_sizes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1)
    unknown = forecast_of(plan, Target())
    assert isinstance(unknown, Unknown) and "no config.json" in unknown.reason
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    unknown = forecast_of(plan, Target())
    assert isinstance(unknown, Unknown) and "no profile of this mamba model" in unknown.reason
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ConfigurationError, match="has no num_hidden_layers"):
        forecast_of(plan, Target())


@pytest.mark.parametrize(
    "changes",
    [{"attention": "eager"}, {"layout": "padded"}, {"head": "model"}, {"task": "sequence-classification"}],
)
def test_the_formulas_are_of_packed_decoders_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    """Another attention keeps other tensors, and another head makes other logits."""
    assert formulas_of(plan_of(tmp_path, 1), LLAMA) is not None
    assert formulas_of(plan_of(tmp_path, 1, **changes), LLAMA) is None


def test_a_model_of_405_billion_parameters_is_planned_without_torch_in_little_memory(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16384,
        "num_hidden_layers": 126,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | sizes))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: big\nmodel: {{name: {tmp_path}, weights: random}}\ndata: {{train: {{path: "
        f"train.jsonl}}, text: text, max_length: 4096}}\n"
        "batch: {global_batch_size: 16384}\ntraining: {max_steps: 10}\ncluster: {nodes: 2048, "
        "gpus_per_node: 8}\n"
    )
    program = (
        "import sys\nfrom launcher.cli.main import main\n"
        f"try:\n    main(['plan', {str(job)!r}, '--gpu', 'h100-80gb', '--json'])\nexcept SystemExit as "
        "left:\n    assert not left.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        # Not getrusage: what this process had before it became Python, the memory of pytest, counts there.
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True
    )
    assert json.loads(done.stdout)["forecast"]["phases"]["steady step"]["bytes"] > 0
    assert int(done.stderr.split()[-2]) < 1 << 20


def plan_for(directory: Path, **changes: Any) -> Plan:
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return plan_of(
        directory, 8, **{"mesh__device": "cuda", "precision": "bf16", "mesh__ranks_per_node": 8} | changes
    )
