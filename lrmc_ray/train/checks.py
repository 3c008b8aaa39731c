"""Settings that a model cannot fulfil, found before anything is recorded."""

from lrmc_ray.config import RunSettings
from lrmc_ray.models import empty_model, local_directory


def check_settings(settings: RunSettings) -> None:
    """Refuse a way of computing activations again, or a router loss, that the model cannot have.

    Raises:
        ConfigError: a setting asks for it by name.
        DataError: transformers cannot make the model.
    """
    train = settings.train
    if train.gradient_checkpointing in ("auto", False) and not train.router_loss:
        return
    # They need torch, and these settings are rare.
    from lrmc_ray.train.recompute import Recomputation
    from lrmc_ray.train.routers import Routers

    model = empty_model(local_directory(settings.model))
    Recomputation(model, train.gradient_checkpointing)
    Routers(model, train.router_loss)
