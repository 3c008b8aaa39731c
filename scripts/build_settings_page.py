"""Write ``docs/settings.md``: every setting with its default, what is allowed, and its meaning.

    python scripts/build_settings_page.py            # writes docs/settings.md
    python scripts/build_settings_page.py --check    # compares, and writes nothing

All of it comes from the settings' own classes. A meaning is the text below a field in
``lrmc_ray/config``; to change the page, change that text and run this again.
"""

import argparse
import sys
from pathlib import Path

from lrmc_ray.config import (
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    ParameterRange,
    RecordSettings,
    ResourceSettings,
    SearchSettings,
    Settings,
    TrainSettings,
)
from lrmc_ray.config.compare import CompareSettings, EffectSettings, MethodSettings
from lrmc_ray.config.words import allowed_text, default_text

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

SECTIONS: dict[str, type[Settings]] = {
    "model": ModelSettings,
    "data": DataSettings,
    "record": RecordSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "search": SearchSettings,
    "parameters.NAME": ParameterRange,
    "resources": ResourceSettings,
    "compare": CompareSettings,
    "methods.NAME": MethodSettings,
    "effects": EffectSettings,
}
"""By the name of the section in a settings file."""

NOTES = {
    "parameters.NAME": "One section for each searched setting of `train`, for example "
    "`[parameters.lr]`.",
    "compare": "`lrmc compare` alone reads this section and the two below.",
    "methods.NAME": "One section for each method that is compared.",
    "effects": "A list, written `[[effects]]`: pairs of methods that differ in one part.",
}

HEAD = """\
# Settings

<!-- Made by scripts/build_settings_page.py from the settings' classes. Change those. -->

Every command reads the same settings. Four places say them, and a later one wins:

1. the defaults below,
2. a TOML file, `--space FILE`, with a section for each heading below,
3. the command line, `section.key=value`, for example `train.lr=1e-5`,
4. the named arguments of a command, for example `--model`.

Values are written as in TOML. A text needs no quotes on the command line. An unknown setting, a
wrong type and a value out of range end the command with exit code 2. The message names the rule,
the value and the nearest known name. Rules over several settings are checked in the same way.

Where a setting is *not set*, its meaning says what happens.
"""


def page() -> str:
    """The whole page in Markdown."""
    return HEAD + "".join(_section(name, settings) for name, settings in SECTIONS.items())


def _section(name: str, settings: type[Settings]) -> str:
    schema = settings.model_json_schema()
    lines = [
        "",
        f"## {name}",
        "",
        _plain((settings.__doc__ or "").strip().splitlines()[0]),
        *([NOTES[name]] if name in NOTES else []),
        "",
        "| setting | default | allowed | meaning |",
        "|---|---|---|---|",
    ]
    required = schema.get("required", [])
    for key, field in schema["properties"].items():
        cells = (
            f"`{key}`",
            "must be given" if key in required else default_text(field.get("default", {})),
            allowed_text(field),
            _plain(field["description"]),
        )
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A docstring's text as Markdown in one line."""
    return " ".join(text.replace("``", "`").split())


def main() -> int:
    """Write or compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed page")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, "utf-8")
        return 0
    if PAGE.read_text("utf-8") == text:
        return 0
    print(f"{PAGE} is out of date; run `python scripts/build_settings_page.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
