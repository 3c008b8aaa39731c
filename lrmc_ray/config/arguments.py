"""The command-line arguments that several commands share, and the settings that they ask for."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.config import (
    RunSettings,
    SettingsType,
    TrainSettings,
    apply_overrides,
    find_space,
    read_toml,
    validate,
)
from lrmc_ray.config.words import allowed_text, default_text
from lrmc_ray.errors import IncompleteArtifactError


def add_run_arguments(parser: argparse.ArgumentParser, *, default_space: str | None = None) -> None:
    """The arguments of every stage that works from a settings file."""
    parser.add_argument(
        "--space",
        default=default_space,
        metavar="FILE",
        help="settings in TOML, or the name of one in tune_spaces/"
        + (f" (default: {default_space})" if default_space else ""),
    )
    parser.add_argument("--model", metavar="M", help="directory or Hugging Face id of the base")
    parser.add_argument(
        "--train-data",
        metavar="[DOMAIN=]FILE",
        action="append",
        help="file, folder, pattern or data set of the Hub, with messages, or prompt and "
        "completion, or text in every row; may be given several times",
    )
    parser.add_argument(
        "--domain-tasks", metavar="TASKS", help="comma-separated tasks that should improve"
    )
    parser.add_argument(
        "--general-tasks", metavar="TASKS", help="comma-separated tasks that must not get worse"
    )
    parser.add_argument(
        "--output",
        type=output_directory,
        default=Path("runs"),
        metavar="DIR",
        help="where everything is kept (default: runs)",
    )
    parser.add_argument(
        "--storage",
        metavar="URI",
        help="resources.storage: where nodes that do not share DIR keep what they exchange, "
        "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
    )
    parser.add_argument(
        "--address",
        default="local",
        help="Ray cluster to join: auto, or host:port (default: start Ray on this machine)",
    )
    parser.add_argument("--json", action="store_true", help="results as one JSON object on stdout")
    parser.add_argument("--verbose", action="store_true", help="show the workers' output, too")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress: only warnings, errors and the result"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example train.lr=1e-5 search.trials=20",
    )


def output_directory(text: str) -> Path:
    """The directory that ``--output`` names.

    Raises:
        IncompleteArtifactError: it is the address of an object store.
    """
    if "://" in text:
        raise IncompleteArtifactError(
            f"--output must be a directory, got the address {text.partition('://')[0]}://...; "
            "give a local one, and the address as --storage, or a directory on a file system that "
            "all nodes share"
        )
    return Path(text)


def settings_from(
    arguments: argparse.Namespace, defaults: Mapping[str, Any] | None = None
) -> RunSettings:
    """The settings that the command line asks for; see :func:`read_settings`."""
    return read_settings(arguments, RunSettings, defaults)


def read_settings(
    arguments: argparse.Namespace,
    kind: type[SettingsType],
    defaults: Mapping[str, Any] | None = None,
) -> SettingsType:
    """The settings of a ``kind`` that the command line asks for.

    Args:
        arguments: the parsed command line.
        kind: the class of settings.
        defaults: by section and key, what counts where no settings file is named.

    Raises:
        ConfigError: a setting is unknown or out of range.
        IncompleteArtifactError: the settings file does not exist.
    """
    path = find_space(arguments.space) if arguments.space else None
    of_file: dict[str, Any] = read_toml(path) if path else dict(defaults or {})
    values = apply_overrides(of_file, arguments.overrides)
    named: dict[tuple[str, str], object] = {
        ("resources", "storage"): arguments.storage,
        ("model", "name"): arguments.model,
        ("data", "train"): arguments.train_data,
        ("evaluate", "domain_tasks"): _names(arguments.domain_tasks),
        ("evaluate", "general_tasks"): _names(arguments.general_tasks),
    }
    for (section, key), value in named.items():
        if value is not None:
            table = values.setdefault(section, {})
            if isinstance(table, dict):  # else the validation says what is wrong
                table[key] = value
    source = str(path) if path else "settings"
    return validate(kind, values, source, of_file=of_file)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Short names of the settings that matter here most."""
    for option, metavar, text in (
        ("--max-length", "TOKENS", "data.max_length: most tokens of a sample"),
        ("--on-long", "POLICY", "data.on_long: error, drop or truncate a longer one"),
        ("--on-bad-row", "POLICY", "data.on_bad_row: error, or skip and list in rejects.jsonl"),
        ("--k-max", "K", "record.k_max: most candidates of a supervised position"),
        ("--prompt-k-max", "K", "record.prompt_k_max: most of a prompt position; 0 records none"),
        ("--actors", "MIN,MAX", "resources.actors: fewest and most actors"),
        ("--num-gpus-per-actor", "N", "resources.gpus_per_worker: GPUs of an actor"),
    ):
        parser.add_argument(option, metavar=metavar, help=text)


_ALIASES = {
    "max_length": "data.max_length",
    "on_long": "data.on_long",
    "on_bad_row": "data.on_bad_row",
    "k_max": "record.k_max",
    "prompt_k_max": "record.prompt_k_max",
    "actors": "resources.actors",
    "num_gpus_per_actor": "resources.gpus_per_worker",
}


def without_aliases(argv: Sequence[str]) -> list[str]:
    """``argv`` with the short names written as the settings that they stand for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_record_arguments(parser)
    named, rest = parser.parse_known_args(argv)
    overrides = []
    for name, setting in _ALIASES.items():
        if (value := getattr(named, name)) is not None:
            overrides.append(f"{setting}={f'[{value}]' if name == 'actors' else value}")
    return rest + overrides


_METAVARS = {"integer": "N", "number": "X", "array": "LIST", "object": "TABLE"}
"""Of a flag, by the type of its setting; others are NAME."""


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting of ``train``: ``--lora-rank 8`` is ``train.lora_rank=8``.

    One that is true or false has two, ``--packing`` and ``--no-packing``.
    """
    group = parser.add_argument_group("settings of train, each the same as train.NAME=VALUE")
    for name, field in TrainSettings.model_json_schema()["properties"].items():
        flag = f"--{name.replace('_', '-')}"
        default = default_text(field.get("default"))
        options: dict[str, Any] = {"dest": f"train.{name}", "default": None}
        if field.get("type") == "boolean":
            text = f"{field['description']} Default: {default}."
            options["action"] = argparse.BooleanOptionalAction
        else:
            text = f"{field['description']} Allowed: {allowed_text(field)}. Default: {default}."
            kinds = [kind.get("type") for kind in field.get("anyOf", [field])]
            options["metavar"] = next((_METAVARS[k] for k in kinds if k in _METAVARS), "NAME")
        text = " ".join(text.replace("`", "").split()).replace("%", "%%")
        group.add_argument(flag, help=text, **options)


def flag_overrides(arguments: argparse.Namespace) -> list[str]:
    """The settings that were given as flags, as overrides."""
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in vars(arguments).items()
        if name.startswith("train.") and value is not None
    ]
