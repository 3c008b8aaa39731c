"""Who may import what. Imports that wait inside a function count as well: ast sees them all."""

import ast
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lrmc_ray"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
STAGES = {"record", "train", "evaluate", "tune", "compare", "report"}
FLOORS = [
    {"errors", "command_line", "method"},
    {"console", "config"},
    {"files", "chat"},
    {"tasks"},
    {"models"},
    {"cluster"},
    {"record", "evaluate"},
    {"train", "report", "ask"},
    {"tune"},
    {"compare", "export"},
    {"outputs"},
]
"""Rooms from the ground up. A room imports those below it; rooms of one floor never each other."""
WITH_RAY = {"cluster", "record", "train", "evaluate", "tune", "compare"}
WITH_OPTUNA = {"tune.importance", "tune.queue", "tune.description"}
HEAVY = {"ray", "torch", "mlflow", "optuna", "transformers", "lm_eval", "pandas", "matplotlib"}


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Full names of everything that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers_of(package: str) -> set[str]:
    return {
        name.removeprefix("lrmc_ray.")
        for name, path in MODULES.items()
        if any(imported.split(".")[0] == package for imported in imports_of(path))
    }


def loaded_by(code: str, *, setup: str = "") -> tuple[set[str], str, float]:
    """Top-level modules in a fresh interpreter behind ``code``, its output, its CPU seconds."""
    script = (
        f"{setup}\nimport atexit, json, os, sys, time\n"
        "atexit.register(lambda: print(json.dumps([sorted({m.partition('.')[0] for m in "
        "sys.modules}), time.process_time()]), file=sys.stderr))\n" + code
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    names, seconds = json.loads(result.stderr.splitlines()[-1])
    return set(names), result.stdout, seconds


def room_of(name: str) -> str:
    """``lrmc_ray.record.reader`` is of the room ``record``."""
    return name.split(".")[1] if "." in name else name


def test_there_are_modules_to_look_at():
    assert {"lrmc_ray", "lrmc_ray.config", "lrmc_ray.method.moclip"} <= set(MODULES)
    assert "lrmc_ray.method.subsets.CandidateSets" in imports_of(PACKAGE / "record" / "reader.py")
    assert {room_of(name) for name in MODULES} == {"lrmc_ray", "__main__", "cli"}.union(*FLOORS)


def test_mlflow_is_imported_by_its_mirror_alone():
    assert importers_of("mlflow") == {
        "report.mlflow",
        "report.mlflow_mirror",
        "report.mlflow_sync",
    }


def test_ray_is_imported_by_the_stages_and_the_cluster_room_alone():
    rooms = {name.split(".")[0] for name in importers_of("ray")}
    assert rooms == WITH_RAY


def test_optuna_is_imported_by_the_search_alone():
    assert importers_of("optuna") == WITH_OPTUNA


def test_the_method_imports_torch_and_itself_alone():
    """Whoever never installed Ray can read, test and reuse the paper's part."""
    compiled = {"numba", "numpy"}
    kernels = {f"lrmc_ray.method.fast.{name}_kernel" for name in ("logits", "moclip")}
    on_gpu = {name for name in MODULES if name.endswith("_triton")}
    for name, path in MODULES.items():
        if name.startswith("lrmc_ray.method"):
            for imported in imports_of(path):
                top = imported.split(".")[0]
                assert (
                    top in {"torch", "__future__"}
                    or top in sys.stdlib_module_names
                    or imported.startswith("lrmc_ray.method.")
                    or (name in kernels and top in compiled)
                    or (name in on_gpu and top == "triton")
                ), f"{name} imports {imported}"


def test_imports_go_down_only():
    """Over every module and every import, those that wait inside a function included."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for name, path in MODULES.items():
        own = room_of(name)
        for imported in imports_of(path):
            if not imported.startswith("lrmc_ray."):
                continue
            other = room_of(imported)
            if own == "console":
                assert other == "errors", f"{name} imports {imported}"
            elif own in floor and other != own:
                assert floor[other] < floor[own], f"{name} imports {imported}"


def test_nobody_imports_a_command():
    """A command parses and starts its stage; what others need of it stands elsewhere."""
    for name, path in MODULES.items():
        starts = name.endswith("__main__")
        for imported in imports_of(path):
            if imported.startswith("lrmc_ray."):
                assert starts or ".command." not in f"{imported}.", f"{name} imports {imported}"
                assert starts or room_of(imported) != "cli", f"{name} imports {imported}"


def test_modules_do_not_import_each_other_in_a_circle():
    """What is imported when a module loads; TorchTrainer's workers load modules in any order."""
    edges: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges[name] = set()
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                edges[name] |= {other for other in names if other in MODULES}
                edges[name] |= {node.module} & set(MODULES)
    while edges:
        free = [name for name, others in edges.items() if not others & edges.keys()]
        assert free, f"a circle among {sorted(edges)}"
        for name in free:
            del edges[name]


def test_no_file_unpickles_or_runs_code_that_it_was_given():
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        for call in ast.walk(ast.parse(text)):
            if not isinstance(call, ast.Call):
                continue
            function = ast.unparse(call.func)
            assert function not in {"pickle.load", "pickle.loads", "eval", "exec", "yaml.load"}, (
                name
            )
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert keywords.get("trust_remote_code", "False") == "False", name
            if function == "torch.load":
                assert keywords.get("weights_only") == "True", name


def test_the_method_loads_no_ray_optuna_mlflow_or_transformers():
    """Nor Triton, which is not everywhere: a loss or step on a GPU loads it."""
    names = [
        name
        for name in MODULES
        if name.startswith("lrmc_ray.method") and not name.endswith("_triton")
    ]
    loaded, _, _ = loaded_by(f"import {', '.join(names)}")
    assert not loaded & ((HEAVY | {"triton"}) - {"torch"})
    assert "torch" in loaded


def test_settings_artifacts_and_errors_load_no_torch():
    loaded, _, _ = loaded_by("import lrmc_ray.config, lrmc_ray.files.artifacts, lrmc_ray.errors")
    assert not loaded & (HEAVY | {"numpy"})
    assert "pydantic" in loaded


@pytest.mark.parametrize("stage", ["record", "train", "evaluate", "tune", "compare"])
def test_a_stage_loads_ray_in_its_session_and_not_before(stage):
    """Ray takes its settings from the environment when it is loaded; the session sets them."""
    module = "driver" if stage == "train" else "run"
    loaded, _, _ = loaded_by(f"import lrmc_ray.{stage}.{module}, lrmc_ray.tune.inputs")
    assert "ray" not in loaded


HELP = """
import runpy, sys
sys.argv = {argv}
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code in (0, None), end.code
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("lrmc_ray", "record"),
        ("lrmc_ray.record", "--train-data"),
        ("lrmc_ray plan", "--sample-tokens"),
        ("lrmc_ray inspect", "--verify"),
        ("lrmc_ray.train", "--space"),
        ("lrmc_ray.evaluate", "--domain-tasks"),
        ("lrmc_ray.tune", "section.key=value"),
        ("lrmc_ray.compare", "--methods"),
        ("lrmc_ray.report", "report.html"),
        ("lrmc_ray doctor", "--cluster"),
    ],
)
def test_help_answers_at_once(module, said):
    """In CPU time, which does not depend on what else the machine does."""
    module, *stage = module.split()
    code = HELP.format(argv=[module, *stage, "--help"], module=module)
    loaded, output, seconds = loaded_by(code)
    assert output.startswith("usage: ")
    assert said in output
    assert not loaded & HEAVY
    assert seconds < 3


def test_the_installed_command_answers_as_the_module_does():
    command = Path(sys.executable).with_name("lrmc")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: lrmc ")
    assert all(stage in result.stdout for stage in STAGES)
