"""What ZeRO-3 holds whole at a time, module by module."""

from __future__ import annotations

import math
import random

import pytest

from launcher.planner.memory import zero3_gathered
from launcher.planner.memory.program import Segment, Unit, Weight
from launcher.planner.memory.zero3_gathered import gathered_elements
from launcher.planner.memory.zero3_prefetch import END, GLOO_THREADS, Coordinator, Module, Tracer
from launcher.planner.memory.zero_states import ZeroCut


def test_the_coordinator_fetches_ahead_and_lets_go() -> None:
    """Ten modules of 100 elements: with a reach of one, two are whole at a time; with no limit all stay."""
    weights = [Weight(f"m{number}.weight", (10, 10)) for number in range(10)]
    order = [*weights, *reversed(weights)]
    trace = [Module((weight,), ("layer", number % 10, number >= 10)) for number, weight in enumerate(order)]
    narrow = Coordinator(trace, 100, 200, 0, copied_below=0).go()
    wide = Coordinator(trace, 100, 10_000, 10_000, copied_below=0).go()
    assert max(narrow.values()) <= 500 < max(wide.values())


def test_a_message_stays_until_the_last_of_its_parameters_is_called_for() -> None:
    """Two parameters of 100 in one message of 200, each copied out of it at the first: the buffer goes when
    the second's module comes."""
    first, second, other = (Weight(f"{name}.weight", (10, 10)) for name in ("a", "b", "c"))
    trace = [
        Module((other,), ("stem", 0, False)),
        *(Module((weight,), ("layer", n, False)) for n, weight in enumerate((first, second))),
    ]
    most = Coordinator(trace, 200, 10_000, 0, copied_below=0).go()
    assert most == {
        ("stem", 0, False): 100 + 200,
        ("layer", 0, False): 200 + 200,
        ("layer", 1, False): 100,
        END: 0,
    }
    doubled = Coordinator(trace, 200, 10_000, 0, copied_below=math.inf).go()
    assert doubled["stem", 0, False] == 100 + 2 * 200 and doubled["layer", 0, False] == 200 + 200


def test_what_is_never_let_go_of_is_there_when_the_last_gradients_are_sent() -> None:
    """A table of words, whose input no gradient goes to, and a message that was gone by then."""
    words, other = Weight("words.weight", (20, 10)), Weight("a.weight", (10, 10))
    back = [Module((other,), ("layer", 0, True)), Module((words,), ("stem", 0, True), leaves=False)]
    most = Coordinator(
        [Module((words,), ("stem", 0, False)), *back], 100, 10_000, 0, copied_below=math.inf
    ).go()
    assert most[END] == most["stem", 0, True] == 200 < most["layer", 0, True]


def test_of_messages_under_way_as_many_are_there_twice_as_gloo_has_threads() -> None:
    """Three single messages of 100 are on their way at once."""
    weights = [Weight(f"{name}.weight", (10, 10)) for name in "abcd"]
    trace = [Module((), ("stem", n, False)) for n in range(3)] + [
        Module((weight,), ("layer", 0, False)) for weight in weights[:3]
    ]
    most = Coordinator(trace, 100, 300, 0, copied_below=math.inf).go()
    assert most["stem", 2, False] == 3 * 100 + GLOO_THREADS * 100


def test_autograd_keeps_a_view_that_is_multiplied_with() -> None:
    """Let go of in the forward pass, fetched again in the backward pass: there twice until the product's
    backward is over."""
    weight, other = Weight("a.weight", (10, 10), viewed=True), Weight("b.weight", (10, 10))
    there, back = ("layer", 0, False), ("layer", 0, True)
    for keeps, kept in ((True, 100), (False, 0)):
        trace = [
            Module((weight,), there, keeps=keeps),
            Module((other,), ("tail", 0, False)),
            Module((weight,), back),
        ]
        most = Coordinator(trace, 1, 10_000, 0, copied_below=0).go()
        assert most["tail", 0, False] == kept + 100 + 100 and most[back] == kept + 100


def test_modules_are_called_behind_those_that_they_are_in() -> None:
    """The whole model with its head first, each path's outer modules once, lists of layers never."""
    words, norm = Weight("model.words.weight", (50, 10)), Weight("model.norm.weight", (10,))
    layer = Unit(
        tuple(
            Weight(f"model.layers.0.{name}.weight", (10, 10))
            for name in ("attention.query", "attention.key", "mlp.up")
        )
    )
    segments = [Segment(kind, number, False) for kind, number in (("stem", -1), ("layer", 0), ("tail", -1))]
    trace = Tracer(Unit((words, norm), 1), [layer], 10, words).trace(segments, recomputes=False)
    names = [
        [weight.name.removeprefix("model.").removesuffix(".weight") for weight in module.weights]
        for module in trace
    ]
    inner = [[], [], ["layers.0.attention.query"], ["layers.0.attention.key"], [], ["layers.0.mlp.up"]]
    assert names == [["words"], [], ["words"], *inner, []] and trace[-1].small == 10


class Counted(Coordinator):
    """Sums at every message what is there, and looks at each later module in turn, in the place of what is
    kept as things come and go."""

    def _note(self, key: tuple[str, int, bool]) -> None:
        sizes = {weight.name: weight.num_elements for module in self.trace for weight in module.weights}
        buffers = {id(message): message.total for message in self.flying.values()}
        assert self.held == sum(sizes[name] for name in self.whole) + sum(
            sizes[name] for name in self.kept
        ) + sum(buffers.values())
        super()._note(key)

    def _used_soon(self, name: str, step: int) -> bool:
        passed, soon = 0, False
        for later in self.trace[step:]:
            if passed >= self.max_reuse:
                break
            soon = soon or name in {weight.name for weight in later.weights}
            passed += later.small + sum(weight.num_elements for weight in later.weights)
        assert super()._used_soon(name, step) == soon
        return soon


@pytest.mark.parametrize("seed", range(100))
def test_what_is_held_is_the_sum_of_what_is_there(seed: int) -> None:
    """Modules that share parameters, messages of one and of many, views that stay, some that never let go:
    any order, any limits."""
    r = random.Random(seed)
    weights = [
        Weight(f"m{number}.weight", (r.randint(1, 100),), viewed=r.random() < 0.4)
        for number in range(r.randint(3, 30))
    ]
    ahead = [
        Module(
            tuple(r.sample(weights, r.randint(0, 3))),
            ("layer", number, False),
            leaves=r.random() < 0.9,
            small=r.randint(0, 5),
            keeps=r.random() < 0.5,
        )
        for number in range(r.randint(1, 40))
    ]
    back = [
        Module(module.weights, ("layer", module.key[1], True), leaves=r.random() < 0.9)
        for module in reversed(ahead)
    ]
    external = frozenset(weight.name for weight in weights if r.random() < 0.1)
    limits = r.randint(1, 500), r.randint(1, 3000), r.randint(0, 1000)
    most = Counted(
        [*ahead, *back], *limits, copied_below=r.choice([0, 100, math.inf]), external=external
    ).go()
    assert max(most.values()) >= max(
        (weight.num_elements for module in ahead for weight in module.weights), default=0
    )


@pytest.mark.parametrize("order", [(4, 2), (2, 4)])
def test_what_gloo_copies_hangs_on_the_precision_whichever_plan_comes_first(
    order: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message of 100 elements is below 300 bytes in half precision alone, where it is copied."""
    monkeypatch.setattr(zero3_gathered, "_CACHE", {})
    layers = [Unit((Weight(f"layers.{number}.a.weight", (10, 10)),)) for number in range(3)]
    segments = [Segment("layer", number, False) for number in range(3)]
    root, most = Unit((Weight("words.weight", (10, 10)),), 1), {}
    for itemsize in order:
        cut = ZeroCut(
            stage=3, ranks=2, itemsize=itemsize, state_copies=2, cpu=True, copied_below=300, accumulation=1,
            reduce_bucket=100, prefetch_bucket=100, persistence=10, max_live=400, sub_group=100, speaks=False,
        )  # fmt: skip
        most[itemsize] = gathered_elements(root, layers, cut, segments)["layer", 0, False]
    assert most[2] > most[4] > 0
