"""From a TOML file and the command line to settings."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lrmc_ray.config.run import RunSettings
from lrmc_ray.config.validation import validate
from lrmc_ray.errors import ConfigError, IncompleteArtifactError


def find_space(name: str) -> Path:
    """The space file ``name``: a path, or one of those shipped in ``tune_spaces/``.

    Raises:
        IncompleteArtifactError: there is no such file.
    """
    here = Path(__file__).parents[1]
    shipped = [folder for folder in (here / "tune_spaces", here.parent / "tune_spaces")]
    if Path(name).is_file():
        return Path(name)
    for folder in shipped:
        for candidate in (folder / Path(name).name, folder / f"{Path(name).name}.toml"):
            if candidate.is_file() and Path(name).parent.name in ("", "tune_spaces"):
                return candidate
    names = sorted({path.name for folder in shipped for path in folder.glob("*.toml")})
    raise IncompleteArtifactError(
        f"space file {name} does not exist; give a path, or one of those that are shipped: "
        + ", ".join(names)
    )


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: the file is not TOML.
        IncompleteArtifactError: the file does not exist.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IncompleteArtifactError(f"{path} does not exist; give a settings file") from None
    except ValueError as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``values`` with every ``section.key=value`` laid over it; values are written as in TOML.

    A bare word that is not TOML is taken as a string, so ``train.loss=full`` needs no quotes.

    Raises:
        ConfigError: an override has no ``=`` or no key.
    """
    result = _copy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"an override is written section.key=value, got {override!r}; "
                "for example train.lr=1e-5"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            value = text
        table = result
        for part in parts[:-1]:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key} cannot be set: {part} is not a section")
            table = inner
        table[parts[-1]] = value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def load_settings(space: Path | None, overrides: Iterable[str] = ()) -> RunSettings:
    """The settings of a run from its TOML file (defaults without one) and the overrides.

    Raises:
        ConfigError: see :func:`validate`.
    """
    values = read_toml(space) if space is not None else {}
    source = str(space) if space is not None else "settings"
    return validate(RunSettings, apply_overrides(values, overrides), source, of_file=values)
