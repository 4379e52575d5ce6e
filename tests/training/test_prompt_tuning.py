"""Prompt tuning and P-tuning: peft's own loss on each sample alone, however samples share a pass."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoder, get_peft_model

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Source, Sources
from launcher.errors import ConfigurationError
from launcher.job.adapter import PROMPT, Adapter
from launcher.planner.dataset.dataset_size import Items, one_pass
from launcher.planner.model import model_support
from launcher.tasks.task import IGNORE, Sample, Task, virtual_ids
from launcher.training.model import adapters, attention, pretrained, prompts
from launcher.training.model.loading import repeated_layers
from tests.families import tiny
from tests.tiers import slow_but
from tests.training.plans import plan_of
from tests.training.runs import tokenizer

ADAPTER = Adapter(method="prompt-tuning", virtual_tokens=5)
ENCODED = {
    "mlp": Adapter(method="p-tuning", virtual_tokens=5, encoder_hidden_size=24),
    "lstm": Adapter(method="p-tuning", virtual_tokens=5, encoder="lstm", encoder_num_layers=3),
}
PEFT = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "sequence-to-sequence": "SEQ_2_SEQ_LM",
    "token-classification": "TOKEN_CLS",
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "causal-lm": [{"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9"}, {"text": "w9 w8"}, {"text": "w3 w5 w7 w11"}],
    "sequence-classification": [
        {"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9", "label": "b"},
        {"text": "w9 w8", "label": "a"},
        {"text": "w3 w5 w7 w11", "label": "c"},
    ],
    "sequence-to-sequence": [
        {"source": "w1 w2 w3 w4 w5 w6 w7 w8 w9", "target": "w4 w3"},
        {"source": "w9 w8", "target": "w1 w2 w3 w4 w5"},
        {"source": "w3 w5 w7 w11", "target": "w8"},
    ],
    "token-classification": [
        {"words": [f"w{number}" for number in range(9)], "tags": [*"OXOXXOOXO"]},
        {"words": ["w9", "w8"], "tags": ["X", "O"]},
        {"words": ["w3", "w5", "w7"], "tags": ["O", "O", "X"]},
    ],
}
COLUMNS: dict[str, dict[str, Any]] = {
    "causal-lm": {"text": "text"},
    "sequence-classification": {"text": "text", "label": "label"},
    "sequence-to-sequence": {"source": "source", "target": "target"},
    "token-classification": {"words": "words", "tags": "tags", "scheme": "none"},
}
LABELS = {"sequence-classification": ["a", "b", "c"], "token-classification": ["O", "X", "Y"]}


def task_of(name: str, config: Any, way: model_support.Way) -> Task:
    """The task with five virtual tokens, for a model and a way for samples to share a pass."""
    kind = tasks.find(name)
    data = kind.Columns(train=Source(path="rows.jsonl"), max_length=32, **COLUMNS[name])
    task = kind(data, LABELS.get(name))
    task.virtual_tokens, task.layout, task.head = ADAPTER.virtual_tokens, way.layout, way.head
    task.adopt(config)
    task.prepare(tokenizer())
    task.configure(config)
    return task


def samples_of(task: Task) -> list[Sample]:
    encoded = task.encode(ROWS[task.name], tokenizer())
    flat = [one[0] if isinstance(one, tuple) and not hasattr(one, "arrays") else one for one in encoded]
    return [Sample(one.arrays, number, one.length) for number, one in enumerate(flat)]


def by_peft(model: Any, task: Task, sample: Sample) -> torch.Tensor:
    """The summed loss of one sample by peft's own model, with the words alone and their labels."""
    ids = torch.from_numpy(sample["input_ids"]).long()[None]
    given = {"input_ids": ids[:, ADAPTER.virtual_tokens :]}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if task.name == "causal-lm":
        # A token is learned at the position before it; the first from the last virtual token, but no <s>.
        labels = torch.from_numpy(sample["targets"]).long()[None, ADAPTER.virtual_tokens - 1 : -1]
    elif task.name == "token-classification":  # peft's leaves it to others to make labels as long as logits
        labels = torch.from_numpy(sample["labels"]).long()[None]
    else:
        labels = torch.from_numpy(sample["label" if "label" in sample else "labels"]).long()[None]
        labels = labels[0] if "label" in sample else labels
    more = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.base_model.forward).parameters else {}
    )
    output = model(**given, labels=labels, **more)
    loss: torch.Tensor = output.loss * (labels != IGNORE).sum()
    return loss


def both(
    name: str, kind: str, together: bool, adapter: Adapter = ADAPTER
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Our loss of three samples and peft's, and the gradients of all that is learned of virtual tokens."""
    config = tiny.config_of(kind, name)
    config.pad_token_id = config.get_text_config().pad_token_id = 0  # the tokenizer's
    experts = "eager" if kind == "mixtral" else None  # the others have no kernel for float64
    build = functools.partial(tiny.model_of, kind, name, experts=experts)
    own, theirs = (build(config=copy.deepcopy(config)).double() for _ in range(2))
    way = model_support.support(name, own.config.to_dict()).ways[0]
    task = task_of(name, own.config, way)
    theirs.config.pad_token_id = own.config.pad_token_id
    own.set_attn_implementation(attention.register(way.attention))
    own.eval(), theirs.eval()
    adapters.inject(own, adapter, repeated_layers)
    starts = {place: start.double() + 0.1 for place, start in adapters.beginning(own, adapter, 17, tokenizer)}
    for place, start in starts.items():
        path, _, key = place.rpartition(".")
        setattr(own.get_submodule(path), key, torch.nn.Parameter(start))
    beside = get_peft_model(theirs, prompts.settings(adapter, own, task_type=PEFT[name])).eval()
    learned = list(beside.prompt_encoder["default"].double().parameters())
    for parameter, start in zip(learned, starts.values(), strict=True):
        parameter.data.copy_(start)
    samples = samples_of(task)
    groups = [samples] if together and way.layout != "single" else [[sample] for sample in samples]
    ours = sum(task.loss(own, task.collate([[one] for one in group])).loss_sum for group in groups)
    expected = torch.stack([by_peft(beside, task, sample) for sample in samples]).sum()
    ours.backward(), expected.backward()
    gradients = [own.get_parameter(place).grad for place in starts], [one.grad for one in learned]
    return ours, expected, *([one for one in some if one is not None] for some in gradients)


CASES = [
    *(("causal-lm", kind) for kind in ("llama", "gpt2", "qwen2", "qwen3", "opt", "bloom", "gemma3_text")),
    *(("causal-lm", kind) for kind in ("mixtral", "mamba", "phi", "cohere", "gpt_neox", "mpt", "falcon")),
    *(("sequence-classification", kind) for kind in ("bert", "roberta", "distilbert", "electra", "albert")),
    *(("sequence-classification", kind) for kind in ("llama", "gpt2", "deberta-v2", "modernbert", "xlnet")),
    *(("sequence-to-sequence", kind) for kind in ("t5", "bart", "mt5", "pegasus", "marian", "mbart")),
    *(("token-classification", kind) for kind in ("bert", "roberta", "distilbert", "gpt2", "modernbert")),
]
FAST = {
    *(("causal-lm", kind) for kind in ("llama", "gpt2", "opt", "bloom", "gemma3_text")),
    *(("sequence-classification", kind) for kind in ("bert", "roberta", "llama")),
    *(("sequence-to-sequence", kind) for kind in ("t5", "bart")),
    *(("token-classification", kind) for kind in ("bert", "gpt2")),
}


@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
@pytest.mark.parametrize(("name", "kind"), slow_but(FAST, CASES))
def test_the_loss_and_its_gradient_are_those_of_peft_alone(name: str, kind: str, together: bool) -> None:
    equal(*both(name, kind, together))


@pytest.mark.parametrize("encoder", ENCODED)
@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but(
        {("causal-lm", "llama"), ("sequence-to-sequence", "t5")},
        [
            ("causal-lm", "llama"),
            ("causal-lm", "gpt2"),
            ("sequence-classification", "bert"),
            ("sequence-to-sequence", "t5"),
            ("sequence-to-sequence", "bart"),
            ("token-classification", "roberta"),
        ],
    ),
)
def test_what_an_encoder_learns_is_what_it_learns_in_peft(name: str, kind: str, encoder: str) -> None:
    equal(*both(name, kind, True, ENCODED[encoder]))


def equal(
    ours: torch.Tensor, expected: torch.Tensor, gradients: list[torch.Tensor], theirs: list[torch.Tensor]
) -> None:
    torch.testing.assert_close(ours.detach(), expected.detach().to(ours.dtype), rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_an_encoder_starts_as_that_of_peft_by_the_seed_alone() -> None:
    for adapter in ENCODED.values():
        model = tiny.model_of("llama", "causal-lm")
        adapters.inject(model, adapter, repeated_layers)
        first, again, other = (
            dict(adapters.beginning(model, adapter, seed, tokenizer)) for seed in (1, 1, 2)
        )
        torch.manual_seed(7)
        theirs = PromptEncoder(prompts.settings(adapter, model))
        assert [name.rpartition("prompt_encoder.")[2] for name in first] == list(theirs.state_dict())
        for start, parameter in zip(first.values(), theirs.parameters(), strict=True):
            assert float(start.std()) == pytest.approx(float(parameter.detach().std()), rel=0.3)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)
        assert {name for name, one in model.named_parameters() if adapter.trains(name)} == set(first)


def differs(name: str, kind: str) -> bool:
    """Whether a family's outputs behind virtual tokens are others than peft's, or are not there."""
    try:
        own, theirs = tiny.model_of(kind, name).eval(), tiny.model_of(kind, name).eval()
        adapters.inject(own, ADAPTER, repeated_layers)
        ((_, vectors),) = adapters.beginning(own, ADAPTER, 17, tokenizer)
        setattr(prompts.embeddings_of(own), PROMPT, torch.nn.Parameter(vectors + 0.1))
        beside = get_peft_model(theirs, prompts.settings(ADAPTER, own, task_type=PEFT[name])).eval()
        beside.prompt_encoder["default"].embedding.weight.data.copy_(vectors + 0.1)
        ids = torch.randint(5, 120, (1, 11), generator=torch.Generator().manual_seed(0))
        more = {"labels": ids[:, :6]} if name == "sequence-to-sequence" else {}
        if "use_cache" in inspect.signature(type(own).forward).parameters:
            more["use_cache"] = False
        virtual = torch.from_numpy(virtual_ids(ADAPTER.virtual_tokens)).long()[None]
        with torch.no_grad():
            ours = own(input_ids=torch.cat([virtual, ids], dim=1), **more).logits
            expected = beside(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    except Exception:  # the classes of fifty families raise whatever they like
        return True
    return bool((ours - expected).abs().max() > 1e-5 * expected.abs().max())


@pytest.mark.very_slow
@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_family_has_the_outputs_of_peft_or_is_refused(name: str) -> None:
    """Of all that the task can be trained with here; about ten minutes."""
    kinds = [kind for kind, entry in model_support.read_table()[name].items() if "ways" in entry]
    refused = {
        kind
        for kind in kinds
        if model_support.why_no_prompt(ADAPTER, name, tiny.config_of(kind, name).to_dict()) is not None
    }
    wrong = {kind for kind in kinds if differs(name, kind)}
    assert wrong <= refused
    assert refused - wrong <= {"longformer", "umt5"}, "these two can tag, but not classify"


def test_a_model_without_a_table_of_words_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"CanineForSequenceClassification names no table .* write lora"
    ):
        prompts.embeddings_of(tiny.model_of("canine", "sequence-classification"))


def test_a_text_without_tokens_is_no_start() -> None:
    bare = Adapter(method="prompt-tuning", init_text="...")
    with pytest.raises(
        ConfigurationError, match=r"init_text = '\.\.\.': the model's tokenizer makes no tokens"
    ):
        next(
            prompts.beginning(
                tiny.model_of("llama", "causal-lm"), bare, 17, lambda: lambda text: {"input_ids": []}
            )
        )


def test_a_scaled_table_gives_scaled_starts() -> None:
    """As in peft, which calls the model's own table."""
    model = tiny.model_of("gemma3_text", "causal-lm")
    named = Adapter(method="prompt-tuning", virtual_tokens=2, init_text="w5 w7")
    [(_, start)] = prompts.beginning(model, named, 17, tokenizer)
    ids = torch.tensor(tokenizer()("w5 w7")["input_ids"][:2])
    assert torch.equal(start, model.get_input_embeddings()(ids).detach())


def test_a_text_that_ends_with_padding_is_no_sample_of_a_decoder_behind_virtual_tokens() -> None:
    way = model_support.Way("padded", "eager")
    task = task_of("sequence-classification", tiny.config_of("llama", "sequence-classification"), way)
    words = tokenizer()
    words.pad_token = words.eos_token
    task.prepare(words)
    [problem] = task.encode(ROWS[task.name][:1], words)
    assert isinstance(problem, RowProblem) and "its last token is the padding token, 2" in problem.detail
    task.virtual_tokens = 0
    assert not isinstance(task.encode(ROWS[task.name][:1], words)[0], RowProblem)


def test_tags_need_room_beside_virtual_tokens() -> None:
    way = model_support.Way("padded", "eager")
    task = task_of("token-classification", tiny.config_of("bert", "token-classification"), way)
    task.virtual_tokens = 29
    with pytest.raises(
        ConfigurationError, match=r"the 2 tokens that .* puts around a text and 29 virtual ones"
    ):
        task.prepare(tokenizer())


@pytest.mark.parametrize("name", sorted(ROWS))
def test_virtual_tokens_count_in_the_longest_sample(name: str) -> None:
    kind = {"sequence-to-sequence": "t5", "causal-lm": "llama"}.get(name, "bert")
    config = tiny.config_of(kind, name)
    task = task_of(name, config, model_support.support(name, config.to_dict()).ways[0])
    task.data = task.data.model_copy(update={"max_length": 12, "too_long": "cut"})
    sample = samples_of(task)[0]
    assert len(sample["input_ids"]) == 12
    assert sample["input_ids"].tolist()[: ADAPTER.virtual_tokens] == [-1, -2, -3, -4, -5]
    assert (sample["input_ids"][ADAPTER.virtual_tokens :] >= 0).all()
    assert task.added_tokens(1, None) >= ADAPTER.virtual_tokens


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_planner_counts_them_in_each_sample(name: str, tmp_path: Path) -> None:
    """Of whole files, and of sources with columns of their own."""
    kind = {"sequence-to-sequence": "t5", "causal-lm": "llama"}.get(name, "bert")
    task = task_of(name, tiny.config_of(kind, name), model_support.Way("padded", "eager"))
    tokenizer().save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    source = Source(path=str(rows))
    sources = Sources(sources=({"path": str(rows)}, {"path": str(rows)}))
    for given in (source, sources):
        plain, behind = (one_pass(given, task.data, str(tmp_path), name, number) for number in (0, 5))
        assert isinstance(plain, Items) and isinstance(behind, Items)
        assert [length + 5 for length in plain.lengths] == list(behind.lengths)


def test_a_model_that_is_first_seen_on_a_rank_is_refused_there(tmp_path: Path) -> None:
    tiny.config_of("esm", "sequence-classification").save_pretrained(tmp_path)
    task = {"task": "sequence-classification", "model__task": "sequence-classification"}
    plan = plan_of(tmp_path, model__adapter={"method": "prompt-tuning"}, data__label="label", **task)
    with pytest.raises(ConfigurationError, match=r"an? esm model does not compute the same from embeddings"):
        pretrained.settled(plan)
