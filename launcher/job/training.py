"""The section `training`: how long, how fast, with which optimizer, and what is done where it goes wrong."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launcher.job.tuning import GroupKey, ParameterGroup, Place
from launcher.values import Every, Fraction, Line, Section

Schedules = Literal[
    "linear",
    "cosine",
    "constant",
    "inverse-sqrt",
    "cosine-restarts",
    "polynomial",
    "warmup-stable-decay",
    "one-cycle",
    "range-test",
]


class EarlyStopping(Section):
    """Stop when an evaluation metric no longer gets better."""

    metric: str = "loss"
    """The metric watched, by its name in the evaluation; of one of several sources as `old/loss`."""
    patience: int = Field(default=3, ge=1)
    """Evaluations without an improvement before the run ends."""
    minimum_delta: float = Field(default=0.0, ge=0)
    """The smallest change that counts as an improvement."""


class OnSpike(Section):
    """Warn, or go back, if the loss jumps and stays up."""

    action: Literal["ignore", "warn", "rewind"] = "warn"
    """`warn` says so and goes on; `rewind` goes back to the weights before and leaves out the samples since;
    `ignore` does neither."""
    threshold: float = Field(default=6.0, gt=0)
    """How far above the running median a loss stands out: in standard deviations (1.4826 MAD), of at least 5%
    of the median."""
    steps: int = Field(default=5, ge=1)
    """Losses in a row that stand out."""
    window: int = Field(default=64, ge=4)
    """Steps of which the running median is taken; nothing stands out before half of them are done."""
    times: int = Field(default=2, ge=1)
    """The most rewinds of one run; if the loss jumps once more, it ends with exit code 8."""


class WeightAverage(Section):
    """Keep a moving average of the weights, sharded as they are: one more fp32 number for each that trains."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """After each step the average is decay x itself + (1 - decay) x the weights."""
    evaluate: bool = False
    """Measure the averages, in training and in `launcher evaluate` and `predict`, in place of the weights."""


class StartingPoint(Section):
    """Pull the weights towards those that training begins with (L2-SP, Li et al. 2018, arXiv 1802.01483): one
    more fp32 number for each that trains."""

    alpha: float = Field(gt=0, le=1e9)
    """In each step a weight first moves by learning rate x alpha x its distance from the start: as by
    `weight_decay` towards zero, apart from the gradient."""
    fisher: Line | None = None
    """A file of `launcher evaluate --fisher`: what each weight's pull is multiplied by (elastic weight
    consolidation, Kirkpatrick et al. 2017, arXiv 1612.00796)."""


class Training(Section):
    """Say how long to train, how fast, and with what."""

    epochs: float | None = Field(default=None, gt=0, le=1_000_000)
    """Passes over the data. 1 where neither epochs nor max_steps is given."""
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Optimizer steps, instead of epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """The highest learning rate."""
    optimizer: Literal["adamw", "adam", "sgd", "muon", "adafactor"] = "adamw"
    """AdamW (decoupled weight decay), Adam, SGD with momentum, Muon for the matrices of the layers with AdamW
    for the rest (FSDP), or Adafactor, whose state is a number for each row and column of a matrix (FSDP)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to Adam's denominator."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How Adam and AdamW keep their two moments: in four bytes each, in two, rounded stochastically, or in one
    with a scale for each block of a row (FSDP)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """The momentum of SGD, or of Muon, whose authors take 0.95."""
    weight_decay: float = Field(default=0.0, ge=0)
    """The decay of matrices. Biases and norms are never decayed, unless `groups` says so. IA3's factors
    count as matrices: they decay towards 0, not towards 1."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The factor of a layer's learning rate for each layer above it, the head among them: the
    highest of n layers has this, the lowest its n-th power, embeddings one more."""
    groups: tuple[ParameterGroup, ...] = ()
    """Learning rates and weight decays by the names of parameters: a list of sections."""
    schedule: Schedules = "cosine"
    """How the learning rate moves after the warm-up, or with it (`one-cycle`). `range-test` is what `launcher
    lr-find` runs: the rate grows by the same factor at each step, and nothing is saved."""
    decay: float = Field(default=0.2, gt=0)
    """For `warmup-stable-decay`: the length of the fall at the end, written as `warmup` is."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    """For `warmup-stable-decay`: the shape of the fall."""
    restarts: int = Field(default=4, ge=1, le=1_000_000)
    """For `cosine-restarts`: how often the rate falls from the highest."""
    power: float = Field(default=1.0, gt=0)
    """For `polynomial`: the power of the share of steps that are left."""
    start_division: float = Field(default=25.0, ge=1)
    """For `one-cycle`: the highest rate divided by that of the first step."""
    stop_factor: float | None = Field(default=None, gt=1)
    """End a `range-test` once the smoothed loss is above this many times its lowest; without it only a loss that
    is not finite ends it."""
    warmup: float = Field(default=0.03, ge=0)
    """The length of the warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    minimum_learning_rate: float = Field(default=0.0, ge=0)
    """Rate at which the fall ends, or `range-test` begins. `constant` and `inverse-sqrt` have no end."""
    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Add noise to the embeddings of what is learned from: alpha / sqrt(tokens x width) times uniform noise in
    [-1, 1] (NEFTune, arXiv 2310.05914); 5 to 15 in its paper."""
    ema: WeightAverage | None = None
    """Keep a moving average of the weights, for evaluation and export."""
    l2_sp: StartingPoint | None = None
    """Stay near the weights that training begins with, of which a new head has none."""
    clip_norm: float = Field(default=1.0, ge=0)
    """The largest global gradient norm; 0 leaves gradients as they are."""
    seed: int = Field(default=17, ge=0)
    """The seed of the order of the data, of dropout and of new weights."""
    evaluate_every: Every | None = None
    """Steps, a time, or epochs between evaluations; at the start and the end in any case."""
    early_stopping: EarlyStopping | None = None
    """Stop when a metric no longer gets better."""
    skip_nonfinite: int = Field(default=10, ge=0)
    """Steps in a row with a NaN or Inf loss or gradient that are skipped before the run stops, or goes back
    where `on_spike` says so."""
    on_spike: OnSpike = OnSpike()

    @property
    def is_range_test(self) -> bool:
        """Return whether the run only shows at which rates the loss falls and rises: its weights are of no
        use."""
        return self.schedule == "range-test"

    @property
    def needs_whole_rows(self) -> bool:
        """Return whether the optimizer works on matrices that are sharded by rows alone, on the device."""
        return self.optimizer in ("muon", "adafactor") or self.moments == "8bit"

    def group_of(self, place: Place, num_dimensions: int, stage: int = 0) -> GroupKey:
        """Return which group of the optimizer a parameter belongs to.

        Layer-wise decay is that of BEiT (Bao et al. 2021, arXiv 2106.08254): the head has the whole rate,
        layer i of n the (n - i)-th power, from 0, and what comes before the layers the (n + 1)-th.
        """
        own = next((group for group in self.groups if group.matches(place.name)), None)
        decay = self.weight_decay if num_dimensions >= 2 else 0.0
        scale: float = self.layer_decay ** (place.num_layers - place.layer)
        if own is not None and own.weight_decay is not None:
            decay = own.weight_decay
        if own is not None and own.learning_rate is not None:
            scale = own.learning_rate / self.learning_rate
        inside = 0 <= place.layer < place.num_layers
        kind = "adamw" if self.optimizer == "muon" else self.optimizer
        return GroupKey(
            decay,
            scale,
            stage,
            "muon" if self.optimizer == "muon" and inside and num_dimensions == 2 else kind,
        )
