"""The command-line arguments that several commands share, and the settings that they ask for."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lrmc_ray.command_line import CommandParser
from lrmc_ray.config import (
    RunSettings,
    SettingsType,
    TrainSettings,
    apply_overrides,
    find_space,
    read_toml,
    validate,
)
from lrmc_ray.config.validation import setting_names
from lrmc_ray.config.words import allowed_text, default_text
from lrmc_ray.errors import IncompleteArtifactError


def add_run_arguments(parser: argparse.ArgumentParser, *, default_space: str | None = None) -> None:
    """The arguments of every stage that works from a settings file."""
    if isinstance(parser, CommandParser):
        parser.settings = setting_names(RunSettings)
    what = parser.add_argument_group("what is learned and asked")
    what.add_argument(
        "--space",
        default=default_space,
        metavar="FILE",
        help="settings in TOML, or the name of one in tune_spaces/"
        + (f" (default: {default_space})" if default_space else " (default: none)"),
    )
    what.add_argument(
        "--model",
        metavar="M",
        help=f"directory or Hugging Face id of the base{_by_default('model.name')}",
    )
    what.add_argument(
        "--train-data",
        metavar="[DOMAIN=]FILE",
        action="append",
        help="file, folder, pattern or data set of the Hub, with messages, or prompt and "
        "completion, or text in every row; may be given several times" + _by_default("data.train"),
    )
    what.add_argument(
        "--domain-tasks",
        metavar="TASKS",
        help="comma-separated tasks that should improve" + _by_default("evaluate.domain_tasks"),
    )
    what.add_argument(
        "--general-tasks",
        metavar="TASKS",
        help="comma-separated tasks that must not get worse"
        + _by_default("evaluate.general_tasks"),
    )
    what.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example train.lr=1e-5 search.trials=20",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--output",
        type=output_directory,
        default=Path("runs"),
        metavar="DIR",
        help="where everything is kept (default: runs)",
    )
    where.add_argument(
        "--storage",
        metavar="URI",
        help="resources.storage: where nodes that do not share DIR keep what they exchange, "
        "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX (default: none)",
    )
    where.add_argument(
        "--address",
        default="local",
        help="Ray cluster to join: auto, or host:port (default: start Ray on this machine)",
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--json", action="store_true", help="results as one JSON object on stdout")
    shown.add_argument("--verbose", action="store_true", help="show the workers' output, too")
    shown.add_argument(
        "--quiet", action="store_true", help="no progress: only warnings, errors and the result"
    )


def _by_default(setting: str) -> str:
    """What is used where the settings file names nothing, either."""
    section, _, name = setting.partition(".")
    value = getattr(getattr(RunSettings(), section), name)
    named = value if isinstance(value, str) else ",".join(value)
    return f" (default: {named})"


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


_ALIASES = {
    "max_length": ("TOKENS", "data.max_length"),
    "on_long": ("POLICY", "data.on_long"),
    "on_bad_row": ("POLICY", "data.on_bad_row"),
    "k_max": ("K", "record.k_max"),
    "prompt_k_max": ("K", "record.prompt_k_max"),
    "actors": ("MIN,MAX", "resources.actors"),
    "num_gpus_per_actor": ("N", "resources.gpus_per_actor"),
}
"""Short names of settings: how the help calls the value, and the setting."""


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Short names of the settings that matter here most."""
    group = parser.add_argument_group("settings of recording, each the same as SECTION.NAME=VALUE")
    settings = RunSettings()
    for option, (metavar, setting) in _ALIASES.items():
        section, _, name = setting.partition(".")
        field = type(getattr(settings, section)).model_json_schema()["properties"][name]
        text = f"{setting}. {_help_text(field)} Default: {default_text(field.get('default'))}."
        group.add_argument(f"--{option.replace('_', '-')}", metavar=metavar, help=_plain(text))


def without_aliases(argv: Sequence[str]) -> list[str]:
    """``argv`` with the short names written as the settings that they stand for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_record_arguments(parser)
    named, rest = parser.parse_known_args(argv)
    overrides = []
    for name, (_, setting) in _ALIASES.items():
        if (value := getattr(named, name)) is not None:
            overrides.append(f"{setting}={f'[{value}]' if name == 'actors' else value}")
    return rest + overrides


_METAVARS = {"integer": "N", "number": "X", "array": "LIST", "object": "TABLE"}
"""Of a flag, by the type of its setting; others are NAME."""


def add_setting_flags(
    parser: argparse.ArgumentParser, names: Collection[str] = tuple(TrainSettings.model_fields)
) -> None:
    """A flag for every setting of ``train``: ``--lora-rank 8`` is ``train.lora_rank=8``.

    One that is true or false has two, ``--packing`` and ``--no-packing``.

    Args:
        parser: gets them.
        names: the settings that have one; by default all.
    """
    group = parser.add_argument_group("settings of train, each the same as train.NAME=VALUE")
    for name, field in TrainSettings.model_json_schema()["properties"].items():
        if name not in names:
            continue
        flag = f"--{name.replace('_', '-')}"
        text = f"{_help_text(field)} Default: {default_text(field.get('default'))}."
        options: dict[str, Any] = {"dest": f"train.{name}", "default": None}
        if field.get("type") == "boolean":
            options["action"] = argparse.BooleanOptionalAction
        else:
            kinds = [kind.get("type") for kind in field.get("anyOf", [field])]
            options["metavar"] = next((_METAVARS[k] for k in kinds if k in _METAVARS), "NAME")
        group.add_argument(flag, help=_plain(text), **options)


def _help_text(field: Mapping[str, Any]) -> str:
    """What a setting means, and what it allows where that is not yes or no."""
    meaning = str(field["description"])
    return (
        meaning if field.get("type") == "boolean" else f"{meaning} Allowed: {allowed_text(field)}."
    )


def _plain(text: str) -> str:
    """``text`` as argparse takes it for a flag's help."""
    return " ".join(text.replace("`", "").split()).replace("%", "%%")


def flag_overrides(arguments: argparse.Namespace) -> list[str]:
    """The settings that were given as flags, as overrides."""
    return [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in vars(arguments).items()
        if name.startswith("train.") and value is not None
    ]
