"""``lrmc export``: the weights that are asked for, whole or absent, with a card that is true."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrmc_ray.console import run_command
from lrmc_ray.errors import DataError
from lrmc_ray.evaluate.changes import compare
from lrmc_ray.evaluate.items import Scores
from lrmc_ray.evaluate.numbers import points
from lrmc_ray.export import new_directory as new_directory_module
from lrmc_ray.export.command import main
from lrmc_ray.export.new_directory import new_directory
from lrmc_ray.export.weights import blend_into, lost_by_rounding
from lrmc_ray.files import fault_points
from lrmc_ray.files.artifacts import file_digest
from lrmc_ray.files.origin import read_origin
from lrmc_ray.models.identity import model_fingerprint
from lrmc_ray.models.loading import load_model
from lrmc_ray.tune.choice import model_of
from tests.support.study_with_models import add_blend, make_study_with_models
from tests.support.synthetic_study import SEED, item_rows
from tests.support.tiny import make_model

BEST = 3
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def shared_study(tiny_model, tmp_path_factory) -> Path:
    """Do not write there."""
    directory = tmp_path_factory.mktemp("export") / "demo-0123456789ab"
    return make_study_with_models(directory, tiny_model)


@pytest.fixture
def study(shared_study, tmp_path) -> Path:
    return Path(shutil.copytree(shared_study, tmp_path / "runs" / shared_study.name))


def exported(study, target, *argv) -> int:
    return run_command(main, [str(study), "--to", str(target), *map(str, argv)])


def test_the_best_models_files_are_copied_byte_by_byte(shared_study, tmp_path, capsys):
    target = tmp_path / "deep" / "mine"
    assert exported(shared_study.parent, target, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    source = model_of(shared_study, BEST)
    assert {path.name for path in target.iterdir()} == {
        *(path.name for path in source.iterdir()), "README.md", "lrmc.json",
    }  # fmt: skip
    for path in source.iterdir():
        assert file_digest(target / path.name) == file_digest(path)
    assert told["fingerprint"] == model_fingerprint(source) == model_fingerprint(target)
    assert told["size_bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert (told["trial"], told["blend"], told["gguf"]) == (BEST, 1.0, None)
    origin = read_origin(target)
    assert (origin.study, origin.trial, origin.blend) == ("demo-0123456789ab", BEST, None)
    assert [path.name for path in target.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_files_are_readable_for_whom_the_umask_allows(
    shared_study, tmp_path, umask, file_mode, folder_mode, dtype
):
    before = os.umask(umask)
    try:
        assert exported(shared_study, tmp_path / "mine", "--dtype", dtype) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == folder_mode
    for path in (tmp_path / "mine").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == file_mode, path


@pytest.mark.parametrize(("weight", "dtype"), [(0.7, "float32"), (0.3, "bf16")])
def test_a_blend_is_between_base_and_tuned(shared_study, tiny_model, tmp_path, weight, dtype):
    assert exported(shared_study, tmp_path / "mine", "--blend", weight, "--dtype", dtype) == 0
    base, tuned = (load_file(one / WEIGHTS) for one in (tiny_model, model_of(shared_study, BEST)))
    made = load_file(tmp_path / "mine" / WEIGHTS)
    assert made.keys() == tuned.keys()
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for name, tensor in made.items():
        assert tensor.dtype == kind
        expected = torch.lerp(base[name].double(), tuned[name].double(), weight)
        precision = torch.finfo(kind).eps
        torch.testing.assert_close(tensor.double(), expected, rtol=precision, atol=1e-7)
    loaded = load_model(tmp_path / "mine", dtype=kind)
    assert torch.equal(loaded.model.embed_tokens.weight, made["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["dtype"] == {"bf16": "bfloat16"}.get(dtype, dtype)
    origin = read_origin(tmp_path / "mine")
    assert (origin.blend, origin.dtype) == (weight, dtype)


def test_the_ends_of_a_blend_are_the_models_themselves(tiny_model, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    for weight, same in ((0.0, tiny_model), (1.0, other)):
        model = load_model(other)
        blend_into(model, load_model(tiny_model), weight)
        for name, tensor in load_model(same).state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)


def test_a_blend_by_depth_keeps_the_first_layer_near_the_base(shared_study, tiny_model, tmp_path):
    assert exported(shared_study, tmp_path / "mine", "--blend", 0.25, "--by-depth") == 0
    base, tuned = (load_file(one / WEIGHTS) for one in (tiny_model, model_of(shared_study, BEST)))
    made = load_file(tmp_path / "mine" / WEIGHTS)
    layers = 1 + max(int(name.split(".")[2]) for name in made if ".layers." in name)
    assert layers == 2
    for name, tensor in made.items():
        weight = 1.0 if ".layers.1." in name else 0.25
        expected = torch.lerp(base[name].double(), tuned[name].double(), weight)
        torch.testing.assert_close(tensor.double(), expected, rtol=2e-7, atol=1e-7)
    origin = read_origin(tmp_path / "mine")
    assert (origin.blend, origin.blend_form) == (0.25, "depth")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "grows from 0.25 in the first layer to 1 in the last" in card
    assert "`lrmc blend OUTPUT/demo-0123456789ab --trial 3 --at 0.25 --by-depth` does that" in card


def test_the_tuned_model_has_no_depth_to_grow_with(shared_study, tmp_path, capsys):
    assert exported(shared_study, tmp_path / "mine", "--by-depth") == 2
    assert "--by-depth needs a --blend below 1, got 1" in capsys.readouterr().err


def test_bf16_rounds_the_tuned_weights(shared_study, tmp_path):
    assert exported(shared_study, tmp_path / "mine", "--dtype", "bf16") == 0
    tuned = load_file(model_of(shared_study, BEST) / WEIGHTS)
    for name, tensor in load_file(tmp_path / "mine" / WEIGHTS).items():
        assert torch.equal(tensor, tuned[name].bfloat16())
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "rounded to bfloat16; scores are those of float32 weights" in card


@pytest.mark.parametrize(("blend", "by_depth"), [(1.0, []), (0.5, []), (0.5, ["--by-depth"])])
def test_what_bf16_loses_of_the_change_is_said(
    shared_study, tiny_model, tmp_path, capsys, blend, by_depth
):
    base, tuned = (load_file(one / WEIGHTS) for one in (tiny_model, model_of(shared_study, BEST)))
    exact = {}
    for name in base:
        part = 1.0 if by_depth and ".layers.1." in name else blend
        exact[name] = (1 - part) * base[name].double() + part * tuned[name]
    errors = torch.cat([(exact[n].bfloat16().double() - exact[n]).flatten() for n in base])
    changes = torch.cat([(exact[n] - base[n]).flatten() for n in base])
    expected = float(errors.norm() / changes.norm())
    argv = ("--dtype", "bf16", "--blend", blend, *by_depth)
    assert exported(shared_study, tmp_path / "told", *argv, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rounding"] == pytest.approx(expected)
    assert exported(shared_study, tmp_path / "said", *argv) == 0
    said = f"rounding to bf16 moves the weights by {expected:.1%} of what training did"
    assert said in capsys.readouterr().out
    assert exported(shared_study, tmp_path / "exact") == 0
    assert "rounding" not in capsys.readouterr().out


def test_what_bf16_loses_is_not_said_where_there_is_nothing_to_compare(tiny_model, tmp_path):
    assert lost_by_rounding(tiny_model, tiny_model) is None
    assert lost_by_rounding(make_model(tmp_path / "untied", tied=False), tiny_model) is None
    wide = make_model(tmp_path / "wide", seed=1)
    assert lost_by_rounding(wide, tiny_model) > 0


def test_a_model_is_exported_to_bf16_without_its_base(study, tiny_model, tmp_path, caplog):
    settings = json.loads((study / "settings.json").read_text())
    settings["model"]["name"] = str(tmp_path / "gone")
    (study / "settings.json").write_text(json.dumps(settings))
    assert exported(study, tmp_path / "mine", "--dtype", "bf16") == 0
    assert "what rounding to bf16 loses is not known: " in caplog.text


def test_another_model_has_no_blend_with_the_base(tiny_model, tmp_path):
    untied = load_model(make_model(tmp_path / "untied", tied=False))
    with pytest.raises(DataError, match=r"1 differ, first lm_head\.weight"):
        blend_into(untied, load_model(tiny_model), 0.5)


def comparison_of(study, scores):
    before, after = Scores.load(study / "base_scores"), Scores.load(scores)
    return compare(before, after, forgetting_weight=1.0, seed=SEED)


def test_the_card_of_another_trial_has_its_own_scores(shared_study, tmp_path):
    assert exported(shared_study, tmp_path / "mine", "--trial", 1) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    compared = comparison_of(shared_study, shared_study / "trials/0001/scores")
    assert f"Domain gain {points(compared.domain_gain.value)} points of 100" in card
    assert "Trial 1 of the study demo." in card
    assert "AdamW" in card
    assert "--served-model-name mine" in card
    assert "chosen from 7 trials by scores that include nl2sql, wordnet" in card


def test_the_card_of_a_blend_claims_only_what_was_measured(study, tmp_path):
    assert exported(study, tmp_path / "unmeasured", "--blend", 0.7) == 0
    card = (tmp_path / "unmeasured" / "README.md").read_text()
    assert "0.7 of the way from the base to trial 3" in card
    assert "`lrmc blend OUTPUT/demo-0123456789ab --trial 3 --at 0.7` does that" in card
    assert "Domain gain" not in card
    assert "| nl2sql" not in card
    add_blend(study, BEST, 0.5, item_rows(BEST, 0.4, 0.006))
    half = comparison_of(study, study / "blends/scores/3-0.5")
    whole = comparison_of(study, study / "trials/0003/scores")
    assert exported(study, tmp_path / "beside", "--blend", 0.7) == 0
    card = (tmp_path / "beside" / "README.md").read_text()
    assert (
        f"at 0.5 gain {points(half.domain_gain.value)}, forgetting "
        f"{points(half.forgetting.value)}; at 1, the trial, gain {points(whole.domain_gain.value)}"
    ) in card
    assert "Domain gain" not in card
    assert exported(study, tmp_path / "measured", "--blend", 0.5) == 0
    card = (tmp_path / "measured" / "README.md").read_text()
    assert f"Domain gain {points(half.domain_gain.value)} points of 100" in card
    assert "was not scored" not in card


def test_the_card_of_a_blend_by_depth_has_scores_of_such_a_blend(study, tmp_path):
    add_blend(study, BEST, 0.5, item_rows(BEST, 0.4, 0.006))
    add_blend(study, BEST, 0.25, item_rows(BEST, 0.3, 0.004), "depth")
    deep = comparison_of(study, study / "blends/scores/3-0.25-depth")
    assert exported(study, tmp_path / "measured", "--blend", 0.25, "--by-depth") == 0
    card = (tmp_path / "measured" / "README.md").read_text()
    assert f"Domain gain {points(deep.domain_gain.value)} points of 100" in card
    assert exported(study, tmp_path / "beside", "--blend", 0.5, "--by-depth") == 0
    card = (tmp_path / "beside" / "README.md").read_text()
    assert f"growing with depth: at 0.25 gain {points(deep.domain_gain.value)}, forgetting" in card
    assert "Domain gain" not in card


def refused(study, target, *argv, capsys):
    """What is said in place of an export that leaves nothing."""
    capsys.readouterr()
    before = sorted(target.parent.iterdir())
    code = exported(study, target, *argv)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sorted(target.parent.iterdir()) == before
    return code, said


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (["--trial", 99], 2, "trial 99 is not there; the finished ones are 0, 1, 2, 3, 5, 6, 8"),
        (["--trial", 4], 2, "trial 4 is FAIL (loss is NaN for 5 steps in a row at step 12);"),
        (["--trial", 9], 2, "trial 9 is RUNNING"),
        (["--blend", 1.5], 2, "--blend must be from 0, the base, to 1, the tuned model, got 1.5"),
        (["--gguf"], 3, "--gguf needs llama.cpp's convert_hf_to_gguf.py, and it is not on the"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    shared_study, tmp_path, monkeypatch, capsys, argv, code, problem
):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    got, said = refused(shared_study, tmp_path / "mine", *argv, capsys=capsys)
    assert got == code
    assert problem in said


def test_a_target_that_is_not_free_is_refused(shared_study, tmp_path, capsys):
    target = tmp_path / "mine"
    target.write_text("x")
    assert refused(shared_study, target, capsys=capsys)[0] == 2
    target.unlink()
    target.mkdir()
    (target / "x").touch()
    code, said = refused(shared_study, target, capsys=capsys)
    assert (code, "is not empty; name another" in said) == (2, True)
    (target / "x").unlink()
    assert exported(shared_study, target) == 0  # an empty one is free


def test_weights_that_were_not_scored_are_refused(study, tmp_path, capsys):
    shutil.rmtree(model_of(study, BEST))
    make_model(model_of(study, BEST), seed=7)
    code, said = refused(study, tmp_path / "mine", capsys=capsys)
    assert code == 4
    assert "must be the model that trial 3 was scored with" in said


def test_another_base_is_refused(study, tmp_path, capsys):
    settings = json.loads((study / "settings.json").read_text())
    settings["model"]["name"] = str(make_model(tmp_path / "base", seed=9))
    (study / "settings.json").write_text(json.dumps(settings))
    code, said = refused(study, tmp_path / "mine", "--blend", 0.5, capsys=capsys)
    assert code == 4
    assert "a blend begins at the base of the search" in said


def test_a_full_disk_is_found_before_anything_is_written(
    shared_study, tmp_path, monkeypatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(new_directory_module.shutil, "disk_usage", lambda _: usage)
    code, said = refused(shared_study, tmp_path / "mine", capsys=capsys)
    assert code == 7
    assert re.search(r"takes \d+ kB, and 1\.0 kB are free there", said)


POINTS = [point for point in fault_points.POINTS if point.startswith("export.")]


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_export_leaves_a_whole_model_or_none(shared_study, tmp_path, point):
    target = tmp_path / "mine"
    pid = os.fork()
    if pid == 0:
        try:
            fault_points._FAULT = f"{point}:kill:1"
            fault_points._passes.clear()
            exported(shared_study, target)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    is_published = point == "export.published"
    assert target.exists() == is_published
    if not is_published:
        assert exported(shared_study, target) == 0
    assert model_fingerprint(target) == model_fingerprint(model_of(shared_study, BEST))
    assert (target / "README.md").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failed_export_removes_what_it_began(shared_study, tmp_path, monkeypatch, capsys):
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text("import sys; print('INFO x', file=sys.stderr); sys.exit('no such model')")
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    code, said = refused(shared_study, tmp_path / "mine", "--gguf", capsys=capsys)
    assert code == 1
    assert "it failed: no such model; export without --gguf" in said


def test_gguf_is_written_by_the_converter_that_is_named(
    shared_study, tmp_path, monkeypatch, capsys
):
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(
        "import json, sys, pathlib\n"
        "source, _, out, _, kind = sys.argv[1:]\n"
        "names = sorted(p.name for p in pathlib.Path(source).iterdir())\n"
        "pathlib.Path(out).write_text(json.dumps([kind, names]))\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    assert exported(shared_study, tmp_path / "mine", "--gguf", "--dtype", "bf16", "--json") == 0
    path = Path(json.loads(capsys.readouterr().out)["gguf"])
    assert path == tmp_path / "mine" / "mine-bf16.gguf"
    kind, names = json.loads(path.read_text())
    assert kind == "bf16"
    assert {"config.json", WEIGHTS, "tokenizer.json"} <= set(names)


def test_the_converter_is_told_of_no_code(study, tmp_path, monkeypatch):
    """llama.cpp's loads tokenizers with ``trust_remote_code``, also from another repository."""
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(
        "import json, os, sys, pathlib\n"
        "source, _, out, _, kind = sys.argv[1:]\n"
        "files = {p.name: p.read_text() for p in pathlib.Path(source).iterdir()\n"
        "         if p.suffix in ('.json', '.py')}\n"
        "told = [os.environ['HF_HUB_OFFLINE'], pathlib.Path(source).name, files]\n"
        "pathlib.Path(out).write_text(json.dumps(told))\n"
    )
    monkeypatch.setenv("LLAMA_CPP", str(script.parent))
    model = model_of(study, BEST)
    path = model / "tokenizer_config.json"
    plain = json.loads(path.read_text())
    named = {"auto_map": {"AutoTokenizer": ["other/repository--tokens.Tokens", None]}}
    vocabulary = {"auto_map": 7}
    path.write_text(
        json.dumps({**plain, "nested": [named | {"ü": 1}], "vocab": vocabulary, **named})
    )
    (model / "tokens.py").write_text("raise SystemExit('code was run')\n")
    assert exported(study, tmp_path / "mine", "--gguf") == 0
    offline, name, files = json.loads((tmp_path / "mine" / "mine-f32.gguf").read_text())
    assert (offline, name) == ("1", "mine")
    assert not any(name.endswith(".py") for name in files)
    assert json.loads(files["tokenizer_config.json"]) == {
        **plain, "nested": [{"ü": 1}], "vocab": vocabulary,
    }  # fmt: skip
    assert files["config.json"] == (model / "config.json").read_text()
    names = {path.name for path in model.iterdir()}
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {
        *names, "README.md", "lrmc.json", "mine-f32.gguf",
    }  # fmt: skip


@pytest.mark.parametrize("where", ["", "adapter"])
def test_a_link_to_a_file_elsewhere_is_not_exported(study, tmp_path, capsys, where):
    secret = tmp_path / "secret"
    secret.write_text("of this machine alone")
    folder = model_of(study, BEST) / where
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").symlink_to(secret)
    assert exported(study, tmp_path / "mine") == 4
    assert "notes.txt is a link to" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_leftovers_go_and_a_running_export_keeps_its_own(tmp_path):
    target = tmp_path / "mine"
    dead = tmp_path / ".mine.999999.partial"
    dead.mkdir()
    (dead / "x").touch()
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from lrmc_ray.export.new_directory import new_directory\n"
        "with new_directory(Path(sys.argv[1])) as d:\n"
        "    (d / 'theirs').touch(); print(d, flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    running = Path(other.stdout.readline().strip())
    assert not dead.exists()
    with new_directory(target) as own:
        (own / "ours").touch()
        assert running.is_dir()
    _, _ = other.communicate()
    assert other.returncode != 0  # ours was first
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in target.iterdir()] == ["ours"]
