"""What one step of training did, in numbers over the global batch."""

from dataclasses import dataclass

from lrmc_ray.method.microbatch import MicroBatch, Sample


@dataclass(frozen=True)
class Gradients:
    """What the backward passes of one global batch leave beside the gradients themselves."""

    loss_sum: float
    anchor_sum: float
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class StepResult:
    """What one step did; sums are over the global batch."""

    step: int
    sample_ids: list[str]
    loss: float
    """Mean over supervised positions, in nats."""
    anchor: float
    """Mean over prompt positions of the KL to the base model, in nats."""
    grad_norm: float
    lr: float
    num_supervised: int
    num_active: int
    num_tokens: int
    num_processed: int
    num_padded: int
    """Token slots of the forward passes."""
    num_shared: int
    """Processed tokens of prefixes that another sequence, or micro-batch, brought along."""
    mean_candidates: float
    """Mean size of the candidate sets of active supervised positions."""
    is_applied: bool
    """False if the gradient was not finite and the update was left out."""
    bad_steps: int
    """Steps in a row, this one the last, whose update was left out."""


def token_slots(batches: list[MicroBatch]) -> int:
    """Tokens that go through the model in a step, padding included."""
    prefixes = [batch.num_prefix for batch in batches if batch.num_prefix]
    spared = sum(prefixes[1:])  # one of the micro-batches has to bring its beginning along
    return sum(batch.input_ids_BT.numel() for batch in batches) - spared


def summarize(
    step: int,
    samples: list[Sample],
    gradients: Gradients,
    grad_norm: float,
    lr: float,
    bad_steps: int,
) -> StepResult:
    """Add up a step.

    Args:
        step: From 0.
        samples: The global batch.
        gradients: What ``compute_gradients`` returned.
        grad_norm: Before clipping.
        lr: Of this step.
        bad_steps: Steps in a row, this one the last, whose update was left out.
    """
    batches = gradients.micro_batches
    supervised = sum(batch.num_supervised for batch in batches)
    prompt = sum(batch.num_prompt for batch in batches)
    active = sum(len(batch.supervised.row_N) for batch in batches)
    candidates = sum(len(batch.supervised.candidates.token_ids) for batch in batches)
    padded = token_slots(batches)
    spared = sum(batch.input_ids_BT.numel() for batch in batches) - padded
    return StepResult(
        step=step,
        sample_ids=[sample.sample_id for sample in samples],
        loss=gradients.loss_sum / max(1, supervised),
        anchor=gradients.anchor_sum / max(1, prompt),
        grad_norm=grad_norm,
        lr=lr,
        num_supervised=supervised,
        num_active=active,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_processed=sum(batch.num_processed for batch in batches),
        num_padded=padded,
        num_shared=sum(batch.num_shared for batch in batches) + spared,
        mean_candidates=candidates / max(1, active),
        is_applied=bad_steps == 0,
        bad_steps=bad_steps,
    )
