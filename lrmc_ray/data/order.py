"""The global order of samples: a function of (seed, epoch, index) alone.

Neither the number of workers nor a restart enters, so every history of worker losses and joins
sees the same samples at the same steps, each exactly once per epoch.
"""

import numpy as np


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(num_samples)`` in which ``epoch`` visits the samples."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_samples)


def samples_of_step(num_samples: int, step: int, *, batch_size: int, seed: int) -> list[int]:
    """Indices of the samples of ``step`` (counted from 0).

    Epochs follow one another without a gap: a batch may end one epoch and begin the next, so a
    sample is never dropped, also where ``batch_size`` does not divide ``num_samples``.
    """
    order: dict[int, np.ndarray] = {}
    indices = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, offset = divmod(position, num_samples)
        if epoch not in order:
            order[epoch] = epoch_order(num_samples, seed=seed, epoch=epoch)
        indices.append(int(order[epoch][offset]))
    return indices
