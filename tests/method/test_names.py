"""Names are said once, and come without torch."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lrmc_ray import method
from lrmc_ray.config import TrainSettings
from lrmc_ray.method import names
from lrmc_ray.method.baselines.magma import Magma
from lrmc_ray.method.baselines.masked_adamw import MaskedAdamW
from lrmc_ray.method.losses import LossSettings
from lrmc_ray.method.moclip import MoClip
from lrmc_ray.method.names import Clip, check_choice, choices
from lrmc_ray.method.optimizers import make_optimizer
from lrmc_ray.method.training_loop import StepOptions

PACKAGE = Path(names.__file__).parents[1]


def test_names_load_without_torch():
    code = "import sys, lrmc_ray.method.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def literals(path: Path) -> list[tuple[str, ...]]:
    """The names of every ``Literal`` of several strings in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            values = tuple(part.value for part in parts if isinstance(part, ast.Constant))
            if len(values) > 1 and all(isinstance(value, str) for value in values):
                found.append(tuple(map(str, values)))
    return found


def test_no_literal_of_the_method_is_said_again_elsewhere():
    ours = literals(PACKAGE / "method" / "names.py")
    assert ("scale", "cautious", "momentum", "project", "rotate", "none") in ours
    assert len(set(ours)) == len(ours) == 14
    for path in PACKAGE.rglob("*.py"):
        if path.name != "names.py":
            assert not set(ours) & set(literals(path)), path
    for path in (PACKAGE / "method").rglob("*.py"):
        if path.name != "names.py":
            assert not literals(path), path


def test_a_choice_that_there_is_not_is_refused_by_name():
    assert choices(Clip)[0] == "scale"
    check_choice("clip", "none", Clip)
    with pytest.raises(ValueError, match=r"^clip must be one of scale, .*, none, got 'Scale'$"):
        check_choice("clip", "Scale", Clip)


@pytest.mark.parametrize(
    ("ours", "shared"),
    [
        (
            MoClip,
            {"weight_decay", "delta_max", "clip", "angle", "second_moment", "atan2_scale"},
        ),
        (MaskedAdamW, {"weight_decay"}),
        (Magma, {"weight_decay", "seed"}),
        (make_optimizer, {"betas", "weight_decay", "mofo_share", "seed"}),
        (StepOptions, {"reduction", "max_grad_norm", "max_bad_steps"}),
        (LossSettings, {"base_kl_weight"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_of_the_method_are_those_of_the_settings(ours, shared):
    """Every default that both have, but two.

    ``betas`` are None in the settings, by optimizer, and ``state_dtype`` is a name there.
    """
    fields = TrainSettings.model_fields
    found = {}
    for name, parameter in inspect.signature(ours).parameters.items():
        if name in fields and parameter.default is not inspect.Parameter.empty:
            found[name] = parameter.default
    others = {"betas", "state_dtype"} if ours in (MoClip, MaskedAdamW, Magma) else set()
    assert set(found) - others == shared
    for name in shared:
        assert found[name] == fields[name].default, name


def test_so_is_that_of_an_argument_with_another_name():
    default = inspect.signature(MaskedAdamW).parameters["share"].default
    assert default == TrainSettings.model_fields["mofo_share"].default


def test_the_documents_notation_is_that_of_the_package():
    """Every letter means the same in both."""
    table = re.findall(r"^([A-Z])  +(.+)$", method.__doc__, re.MULTILINE)
    page = (PACKAGE.parent / "docs" / "method.md").read_text(encoding="utf-8")
    notation = page[page.index("## Notation") :].partition("\n## ")[0]
    assert re.findall(r"^\| ([A-Z]) \| (.+) \|$", notation, re.MULTILINE) == table
    assert len(table) == len({letter for letter, _ in table}) > 12


def names_in(path: Path) -> set[str]:
    """Of variables, arguments and fields."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


def test_every_suffix_is_in_the_notation_and_no_other_letter():
    """A small letter is part of what the capital counts; a digit is a length."""
    letters = set(re.findall(r"^([A-Z])  ", method.__doc__, re.MULTILINE))
    found: dict[str, tuple[Path, str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for name in names_in(path):
            if suffix := re.fullmatch(r"[a-z][a-z0-9_]*_([a-z]?[A-Z]+[a-z]?)[0-9]*", name):
                found |= {letter.upper(): (path, name) for letter in suffix[1]}
    assert {letter: where for letter, where in found.items() if letter not in letters} == {}
    assert set(found) == letters
