"""What a learning-rate range test suggests of curves whose answer is known, and which tests are refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.launch.lr_find import Span, find_test, open_test
from launcher.launch.plan_file import read_plan
from launcher.launch.run_setup import open_run
from launcher.runs import range_test
from launcher.runs.events import append
from launcher.runs.layout import RunDirectory
from launcher.runs.range_test import RangeCurve, SmoothedLoss

NUM_STEPS = 100
SPAN = Span()


def valley(rate: float) -> float:
    """A loss of 2 that falls to 1 around 1e-4, and rises from 1e-2 on; by the logarithm of the rate."""
    place = math.log10(rate)
    return 2 - 1 / (1 + math.exp(-6 * (place + 4))) + math.exp(4 * (place + 1.5))


def curve_of(law: Callable[[float], float], num_steps: int = NUM_STEPS, noise: float = 0.0) -> RangeCurve:
    """The losses of a test from 1e-7 to 1 that ends as the trainer's does."""
    generator, smoothed = random.Random(5), SmoothedLoss()
    rates: list[float] = []
    losses: list[float] = []
    for step in range(num_steps):
        rates.append(1e-7 ** (1 - step / (num_steps - 1)))
        losses.append(law(rates[-1]) + generator.gauss(0, noise))
        smoothed.add(losses[-1])
        if smoothed.diverged(4.0):
            break
    return RangeCurve(tuple(rates), tuple(losses))


def test_the_average_is_bias_corrected_as_adams_moments_are() -> None:
    losses, smoothed, moment = [3.0, 2.0, 4.0, 1.0], SmoothedLoss(), 0.0
    for number, loss in enumerate(losses, start=1):
        moment = range_test.BETA * moment + (1 - range_test.BETA) * loss
        assert smoothed.add(loss) == pytest.approx(moment / (1 - range_test.BETA**number))
    assert SmoothedLoss().add(7.0) == 7.0


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_of_a_valley_a_tenth_of_the_lowest_is_suggested(noise: float) -> None:
    found = curve_of(valley, noise=noise).suggest(NUM_STEPS)
    assert found.rate is not None and found.lowest is not None and found.steepest is not None
    assert found.rate == found.lowest / 10
    # The moving average comes some steps late: of 100 steps over 7 decades, up to one decade.
    assert 3e-3 < found.lowest < 3e-2 and 1e-4 <= found.steepest < 1e-3
    assert "a tenth of" in found.reason and "falls fastest" in found.reason


def test_the_lowest_and_the_steepest_are_those_of_the_smoothed_curve() -> None:
    curve = curve_of(valley)
    found, smoothed = curve.suggest(NUM_STEPS), curve.smoothed
    inner = range(NUM_STEPS // 10, len(smoothed))
    assert found.lowest == curve.rates[min(inner, key=lambda at: smoothed[at])]
    slopes = {at: smoothed[at + 1] - smoothed[at - 1] for at in inner if curve.rates[at] < found.lowest}
    assert found.steepest == curve.rates[min(slopes, key=lambda at: slopes[at])]


def test_a_loss_that_falls_to_the_end_says_so() -> None:
    found = curve_of(lambda rate: 2 - 0.1 * (7 + math.log10(rate))).suggest(NUM_STEPS)
    assert found.rate == pytest.approx(0.1) and "still fell at the end" in found.reason


@pytest.mark.parametrize(
    "law", [lambda rate: 2.0, lambda rate: 2 + rate, lambda rate: 2 + math.log10(rate) / 100 + 0.07]
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_loss_that_never_fell_suggests_nothing(law: Callable[[float], float], noise: float) -> None:
    found = curve_of(law, noise=noise).suggest(NUM_STEPS)
    assert found.rate is None and "never fell" in found.reason


def test_noise_alone_is_seldom_taken_for_a_fall() -> None:
    suggested = 0
    for seed in range(200):
        generator = random.Random(seed)
        losses = tuple(generator.gauss(2, 0.2) for _ in range(NUM_STEPS))
        suggested += RangeCurve(curve_of(lambda rate: 1.0).rates, losses).suggest(NUM_STEPS).rate is not None
    assert suggested <= 10


def test_a_test_that_diverges_early_has_too_few_points() -> None:
    found = curve_of(lambda rate: 1.0 if rate < 1e-6 else math.nan).suggest(NUM_STEPS)
    assert found.rate is None and "too few" in found.reason and "not finite, at 1.1e-06" in found.reason
    assert RangeCurve((), ()).suggest(NUM_STEPS).rate is None


def test_what_comes_behind_a_loss_that_is_not_finite_does_not_count() -> None:
    whole = curve_of(valley)
    place = next(at for at, rate in enumerate(whole.rates) if rate > 0.02)
    losses = (*whole.losses[:place], math.nan, *whole.losses[place + 1 :])
    assert RangeCurve(whole.rates, losses).suggest(NUM_STEPS).rate == whole.suggest(NUM_STEPS).rate


def test_a_suggestion_below_the_test_says_so() -> None:
    curve = curve_of(valley)
    shifted = RangeCurve(tuple(rate**0.1 for rate in curve.rates), curve.losses)  # all of it within a decade
    found = shifted.suggest(NUM_STEPS)
    assert found.rate is not None and found.rate < shifted.rates[0]
    assert "the test began above it" in found.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_end_is_a_loss_far_above_the_lowest_or_not_finite(bad: float) -> None:
    smoothed = SmoothedLoss()
    for loss in (4.0, 1.0, 1.0):
        smoothed.add(loss)
    assert not smoothed.diverged(4.0)
    lowest = smoothed.value
    while not smoothed.diverged(4.0):
        assert smoothed.value <= 4 * lowest
        smoothed.add(100.0)
    assert smoothed.value > 4 * lowest and not smoothed.diverged(None)
    smoothed.add(bad)
    assert smoothed.diverged(None)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job with everything that a test leaves out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a b c"}\n' * 8, encoding="utf-8")
    (tmp_path / "held.jsonl").write_text('{"text": "a b c"}\n' * 2, encoding="utf-8")
    llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"vocab_size": 99, "intermediate_size": 64}
    content: dict[str, Any] = {
        "name": "words",
        "model": {
            "name": "nowhere",
            "config": llama,
            "weights": "random",
            "freeze": {"layers": "0"},
            "unfreeze": [{"at": 0.5, "from": 0}],
        },
        "data": {"train": {"path": "train.jsonl"}, "evaluation": {"path": "held.jsonl"}, "text": "text"},
        "batch": {"global_batch_size": 4},
        "training": {
            "epochs": 3,
            "learning_rate": 2e-5,
            "schedule": "one-cycle",
            "start_division": 10.0,
            "evaluate_every": 5,
            "early_stopping": {},
            "ema": {},
            "on_spike": {"action": "rewind"},
            "groups": [
                {"parameters": ["lm_head.*"], "learning_rate": 1e-3},
                {"parameters": ["model.norm.*"], "weight_decay": 0.1},
            ],
        },
        "checkpoint": {"keep_best": 1},
        "cluster": {"gpus_per_node": 0},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_run_is_the_job_with_rates_that_grow(job: Path) -> None:
    run, plan = open_test(job, ["training.weight_decay=0.3"], 1, None, SPAN)
    training = plan.training
    assert run.path == job.parent / "runs" / "words-lr-find" and plan.name == "words-lr-find"
    assert (training.schedule, training.minimum_learning_rate, training.learning_rate) == (
        "range-test",
        1e-7,
        1,
    )
    assert (training.max_steps, training.stop_factor, training.weight_decay) == (100, 4.0, 0.3)
    again = open_test(job, [], 1, None, Span(stop_factor=None))[0]
    assert read_plan(again).training.stop_factor is None and read_plan(run).training == training
    assert plan.data.evaluation is None and training.ema is None and training.on_spike.action == "ignore"
    assert plan.model.unfreeze == () and plan.model.freeze.layers is not None and plan.trackers == ()
    assert training.groups[0].learning_rate == pytest.approx(50)  # 1e-3 of 2e-5, as before
    assert training.groups[1].learning_rate is None and training.groups[1].weight_decay == 0.1
    assert not (job.parent / "runs" / "words").exists()


def test_each_test_has_a_directory_of_its_own(job: Path) -> None:
    paths = [open_test(job, [], 1, None, SPAN)[0].path.name for _ in range(3)]
    assert paths == ["words-lr-find", "words-lr-find-2", "words-lr-find-3"]
    with pytest.raises(ConfigurationError, match="holds something already"):
        open_test(job, [], 1, Path("runs/words-lr-find"), SPAN)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "0"], "--from = 0.0: a learning rate is a number above 0"),
        (["--to", "nan"], "--to = nan: a learning rate is a number above 0"),
        (["--from", "1e-3", "--to", "1e-4"], "--from is 0.001; write a higher one, as 0.01"),
        (["--steps", "5"], "--steps = 5: too few to see a curve in their losses; write 20 or more"),
        (["--stop-factor", "4", "--no-stop"], "--stop-factor = 4.0: --no-stop goes on to the last step"),
        (["--stop-factor", "1"], "--stop-factor = 1.0: times the lowest smoothed loss"),
        (["--set", "training.l2_sp={alpha: 4}", "--set", "model.weights=pretrained"], "write 0.005 or less"),
    ],
)
def test_tests_that_make_no_sense_are_refused(
    arguments: list[str], said: str, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(["lr-find", str(job), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["minimum_learning_rate=0"], "write a rate above 0 and below that, as 2e-12"),
        (["minimum_learning_rate=2e-5"], "grows by the same factor"),
        (["minimum_learning_rate=1e-9", "warmup=3"], "has no warm-up"),
        (["minimum_learning_rate=1e-9", "on_spike.action=rewind"], "saves nothing"),
        (["schedule=constant", "stop_factor=3"], "is a key of the schedule range-test"),
    ],
)
def test_a_job_says_what_a_range_test_can_do(settings: list[str], said: str, job: Path) -> None:
    plain = ["schedule=range-test", "start_division=25.0", "on_spike.action=warn", "warmup=0", *settings]
    with pytest.raises(ConfigurationError) as refused:
        load(job, [f"training.{one}" for one in plain])
    assert said in str(refused.value)


def left_with(arguments: list[str]) -> object:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return left.value.code


def written(job: Path, law: Callable[[float], float]) -> RunDirectory:
    """A test's directory with the steps of a law."""
    run, _ = open_test(job, [], 1, None, SPAN)
    curve = curve_of(law)
    for step, (rate, loss) in enumerate(zip(curve.rates, curve.losses, strict=True), start=1):
        append(run.metrics_file, {"kind": "train", "step": step, "loss": loss, "learning_rate": rate})
    return run


def test_a_test_that_was_run_is_shown_again(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(job, valley)
    assert left_with(["lr-find", str(run.path)]) == 0
    shown = capsys.readouterr().out
    rate = f"{curve_of(valley).suggest(NUM_STEPS).rate:.2g}"
    assert (
        f"suggested: {rate}: a tenth of" in shown and f"write: --set training.learning_rate={rate}" in shown
    )
    assert "1e-5" in shown and "runs/words-lr-find/lr-find.svg" in shown and "multiply them alike" in shown
    assert (run.path / "lr-find.svg").read_text(encoding="utf-8").startswith("<svg")
    assert left_with(["lr-find", str(run.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((run.path / "lr-find.json").read_text(encoding="utf-8"))
    assert told["suggestion"] == float(rate) and told["set"] == f"training.learning_rate={rate}"
    assert len(told["rates"]) == len(told["losses"]) == len(told["smoothed"]) < NUM_STEPS


def test_a_test_that_was_run_as_any_run_says_how_to_look_at_it(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(job, valley)
    run.finished_file.touch()
    assert left_with(["resume", str(run.path)]) == 0
    assert "next: launcher lr-find runs/words-lr-find" in capsys.readouterr().out


def test_nothing_to_suggest_is_said_and_ends_with_1(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(job, lambda rate: 2.0 if rate < 0.1 else math.nan)
    assert left_with(["lr-find", str(run.path)]) == 1
    assert "nothing to suggest: the loss never fell" in capsys.readouterr().out
    assert left_with(["lr-find", str(run.path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["suggestion"] is None and told["losses"][-1] == "nan"


def test_what_is_no_test_is_refused(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = open_test(job, [], 1, None, SPAN)
    assert left_with(["lr-find", str(run.path), "--nproc", "2"]) == 2
    assert "a test that was run keeps its settings" in capsys.readouterr().err
    plain = ["training.on_spike.action=warn", "training.ema=null"]
    run, _ = open_run(job, plain, 1, None)
    with pytest.raises(ConfigurationError, match="is a run and no range test"):
        find_test(run.path)
