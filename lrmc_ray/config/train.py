"""Settings of Stage 1: the loss, the optimizer, the steps, the checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from lrmc_ray.config.base import Betas, Patterns, Settings
from lrmc_ray.method.names import (
    Angle,
    Clip,
    Loss,
    OptimizerName,
    Parallel,
    Reduction,
    Schedule,
    SecondMoment,
)


class TrainSettings(Settings):
    """Stage 1: the loss, the optimizer and the budget."""

    loss: Loss = "restricted"
    """``restricted`` is the paper's, ``frozen_tail`` the same with the base's mass outside,
    ``full`` ordinary fine-tuning, the others baselines. ``frozen_tail`` and ``kl_to_base`` hold
    the base model beside."""
    base_kl_weight: float = Field(1.0, ge=0)
    """Weight of KL(base || model) with ``kl_to_base``, and on the recorded candidates with
    ``asft``."""
    flow_temperature: float | None = Field(None, gt=0)
    """With ``flow`` a sample weighs exp(-loss / temperature), loss being the base's per token, in
    nats; by default the median of the samples' losses."""
    stm_perplexity: float | None = Field(None, gt=1)
    """Perplexity of the base above which a token is not learned (STM, there 2.5); none by
    default."""
    tau: float = Field(0.99, gt=0, le=1)
    """Probability that the candidates of a position cover."""
    k_min: int = Field(1, ge=1)
    """Fewest candidates; 2 keeps positions active of which the base model was sure."""
    keep_gold: bool = True
    """False, an ablation: no position where the gold token is not among the candidates anyway."""
    tail_samples: int = Field(1024, ge=0)
    """Sampled tokens that stand for the mass outside the candidates, at most the vocabulary; 0 is
    the paper's loss."""
    anchor_weight: float = Field(1.0, ge=0)
    """Weight of the KL to the base model on prompt positions; 0 is the paper."""
    router_loss: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of a mixture's routers; 0 leaves it out, as transformers
    does. Models that balance by a bias of their own (DeepSeek-V3) do without. The load of the
    busiest expert is logged either way."""
    optimizer: OptimizerName = "moclip"
    """``adam_atan2`` is MoClip without the cap, the others are baselines."""
    lr: float = Field(3e-5, gt=0, lt=1)
    """Peak learning rate."""
    betas: Betas | None = None
    """Decay of the moments; default (0.9, 0.99) for MoClip, (0.9, 0.999) for AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, multiplied by the learning rate."""
    mofo_share: float = Field(0.15, gt=0, le=1)
    """Share of each tensor that ``mofo`` moves in a step."""
    l2_sp_weight: float = Field(0.0, ge=0)
    """Weight of half the squared distance from the base's weights (L2-SP), in the loss."""
    delta_max: float = Field(90.0, gt=0, le=180)
    """Largest angle between gradient and momentum, in degrees; 180 switches the cap off, that of
    weights, too."""
    clip: Clip = "cautious"
    """Reading of the cap, see ``method/angle_cap.py``. ``cautious`` is ``scale``, and leaves out
    of a step the weights that would move against their gradient."""
    angle: Angle = "tensor"
    """One angle per tensor, or one for the whole model."""
    second_moment: SecondMoment = "raw"
    """Whether the second moment sees the gradient before or after the cap."""
    atan2_scale: float = Field(1.0, gt=0)
    """Factor a of the step a * atan2(m, sqrt(v)). With 1 a learning rate means what it does to
    AdamW, where the step is small; Adam-atan2 has 1.27, which is a larger learning rate."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly."""
    steps: int = Field(30, ge=1)
    """Optimizer updates."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data, rounded up to whole steps; replaces ``steps``."""
    domain_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """How often per epoch the samples of a domain are used (patterns allowed); by default 1."""
    replay_share: float | None = Field(None, ge=0, lt=1)
    """Share of the samples that are of the domain ``replay``: general text against forgetting.
    By default it is a domain as any other."""
    freeze: Patterns = ()
    """Parameters that stay as they are, by pattern: ``model.layers.[0-9].*``."""
    lora_rank: int = Field(0, ge=0)
    """Rank of low-rank adapters that are trained in place of the weights; 0 trains the weights."""
    lora_alpha: int = Field(16, ge=1)
    """Adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: Patterns = ()
    """Names of the linear layers and stacked experts that get an adapter; by default all that can:
    not the output head, routers, and layers whose weight the model reads past them."""
    packing: bool = True
    """Compute prefixes that samples of a micro-batch share once, without padding, where that is
    cheaper, and what all samples of a step begin with once for all micro-batches (on a CPU, in
    fp32); the loss is the same up to rounding. Models with windows of attention are packed while
    every sample is within the shortest one."""
    gradient_checkpointing: Literal["auto", False, "selective", "full"] = "auto"
    """What the backward pass computes again, for less memory and the same result: ``selective``
    what is cheap (norms, activation functions), ``full`` whole layers, about a third more time,
    ``auto`` what is cheap in micro-batches of 2,048 tokens and more, and nothing in others. The
    first such batch proves that gradients stay the same; otherwise ``auto`` takes less, and says
    so."""
    compile_layers: bool = False
    """Compile the layers with ``torch.compile``, for fewer calls, which a small model on a GPU
    waits for; rows are filled up to a multiple of 64 tokens. The loss is the same up to rounding.
    On a CPU it takes a C++ compiler. Not for mixtures of experts; nothing is computed again."""
    batch_size: int = Field(8, ge=1)
    """Samples per step, over all workers."""
    micro_batches: int = Field(4, ge=1)
    """Fixed parts of a batch; at least the largest number of workers."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradient clipping by norm; none by default."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """``bf16`` runs the forward pass under autocast; weights stay float32, and shards are gathered
    in bf16. ``auto`` takes it where the hardware computes in it and loss and gradient of the first
    batch stay within 1 % and 10 % of those in fp32; all trials of a search train alike."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of MoClip's two moments. ``bf16`` with stochastic rounding halves their memory: 4 bytes
    for each trained weight in place of 8."""
    reduction: Reduction = "strict"
    """``strict``: bit-identical for every number of workers; ``fast``: one all-reduce."""
    parallel: Parallel = "replicate"
    """``replicate``: every worker holds the whole model; ``shard``: its part of every weight, with
    the gradient and the moments of that part, for models that do not fit one device. The result is
    the same up to rounding."""
    offload: Literal["none", "cpu"] = "none"
    """``cpu``, with shards on GPUs: weights, gradients and moments are in the host's memory, and
    the optimizer's step is made there; a GPU holds layers while they work, and activations."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Order of the samples, dropout and sampled tails."""
    checkpoint_every: int = Field(10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept; the best one is kept as well."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations on held-out samples; 0 holds out none."""
    holdout_share: float = Field(0.05, gt=0, lt=1)
    """Share of the samples that is held out where ``evaluate_every`` is set; at least one."""
    export: Literal["last", "best"] = "last"
    """Which weights become the model: the last, or those with the least held-out loss."""
    refresh_every: int = Field(0, ge=0)
    """Steps after which the candidates of the coming samples are recorded again with the current
    model; 0 keeps the base model's."""
    probe_every: int = Field(10, ge=0)
    """Steps between measurements of the outside mass; 0 switches them off."""
    probe_positions: int = Field(64, ge=2)
    """Positions per measurement, each over the full vocabulary."""
    max_bad_steps: int = Field(5, ge=1)
    """Consecutive steps without a finite gradient after which training fails."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"micro_batches must not exceed batch_size, got {self.micro_batches} > "
                f"{self.batch_size}; lower train.micro_batches"
            )
        if self.epochs is None and self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps must not exceed steps, got {self.warmup_steps} > {self.steps}; "
                "lower train.warmup_steps"
            )
        if self.betas and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.export == "best" and not self.evaluate_every:
            raise ValueError(
                "evaluate_every must be at least 1 with export = 'best', got 0: there is nothing "
                "to choose by; set train.evaluate_every"
            )
        if self.state_dtype != "fp32" and self.optimizer not in ("moclip", "adam_atan2"):
            raise ValueError(
                f"state_dtype must be 'fp32' with optimizer = {self.optimizer!r}, got "
                f"{self.state_dtype!r}; 'moclip' and 'adam_atan2' keep bf16 moments"
            )
        if self.compile_layers and self.gradient_checkpointing not in ("auto", False):
            raise ValueError(
                "gradient_checkpointing must be 'auto' or false with compile_layers, got "
                f"{self.gradient_checkpointing!r}: the compiler chooses what is kept; leave one of "
                "them out"
            )
        if self.freeze and self.lora_rank:
            raise ValueError(
                "freeze must be empty with adapters, which leave all weights as they are, got "
                f"lora_rank = {self.lora_rank}; use train.lora_targets"
            )
        if self.refresh_every and self.loss in ("soft", "asft"):
            raise ValueError(
                f"refresh_every must be 0 with loss = {self.loss!r}, whose targets are the base "
                "model's; leave one of them out"
            )
        if self.refresh_every and not self.keep_gold:
            raise ValueError(
                "refresh_every must be 0 with keep_gold = false, which is about the recorded sets; "
                "leave one of them out"
            )
        if self.l2_sp_weight and self.lora_rank:
            raise ValueError(
                "l2_sp_weight must be 0 with adapters, which leave all weights as they are, got "
                f"lora_rank = {self.lora_rank}; leave one of them out"
            )
        if self.replay_share is not None and "replay" in self.domain_weights:
            raise ValueError(
                "domain_weights must not name the domain replay, whose share is replay_share, got "
                f"{sorted(self.domain_weights)}; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_in_shards(self) -> Self:
        if self.offload == "cpu" and self.parallel != "shard":
            raise ValueError(
                f"offload must be 'none' with parallel = {self.parallel!r}, got 'cpu': it is "
                "shards that are taken to the host's memory; set train.parallel to 'shard', which "
                "a single worker can have too"
            )
        if self.parallel != "shard":
            return self
        if self.reduction == "strict":
            raise ValueError(
                "reduction must be 'fast' with parallel = 'shard', got 'strict': to add the "
                "gradients of micro-batches in a fixed order every worker would have to hold them "
                "whole; set train.reduction to 'fast', or train.parallel to 'replicate'"
            )
        if self.precision == "auto":
            raise ValueError(
                "precision must be 'fp32' or 'bf16' with parallel = 'shard', got 'auto', which "
                "tries the first batch on the whole model; name one"
            )
        if self.compile_layers:
            raise ValueError(
                "compile_layers must be false with parallel = 'shard', whose layers gather their "
                "weights on the way, got true; leave one of them out"
            )
        return self
