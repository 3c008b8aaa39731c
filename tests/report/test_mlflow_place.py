"""An output directory that is moved or copied takes its files in MLflow along."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from lrmc_ray.console import run_command
from lrmc_ray.errors import DataError
from lrmc_ray.files.names import default_tracking_uri
from lrmc_ray.report.mlflow import register_model
from lrmc_ray.report.mlflow_command import main as mlflow_sync
from lrmc_ray.report.mlflow_place import follow_a_move
from lrmc_ray.report.mlflow_sync import sync
from tests.support.synthetic_study import make_study

STUDY = "demo-0123456789ab"
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An output whose study, with artifacts and a registered model, is in its MLflow."""
    output = tmp_path_factory.mktemp("made") / "my runs"
    study = make_study(output / STUDY)
    values = json.loads((study / "study.json").read_text())
    values |= {"trials": values["trials"][:2], "state": "FINISHED", "best": 0, "final": {}}
    values["artifacts"] = [{"path": "study.json", "folder": "config"}]
    (study / "study.json").write_text(json.dumps(values))
    (study / "best_model").mkdir()
    (study / "best_model" / "config.json").write_text("{}")
    uri = default_tracking_uri(output)
    sync(study, uri)
    register_model(study, study / "best_model", "mine", uri)
    return output


@pytest.fixture
def output(made, tmp_path):
    """Where it was made, and a copy of it, as a process finds them that has seen neither."""
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # where a run's files were, by its id
    return made, Path(shutil.copytree(made, tmp_path / "new place" / "runs"))


def addresses(output):
    with contextlib.closing(sqlite3.connect(output / "mlflow.db")) as connection:
        return [
            value
            for table, column in ADDRESSES
            for (value,) in connection.execute(f"SELECT {column} FROM {table}")
            if value is not None and "mlruns" not in value
        ]


def client_of(output):
    from mlflow import MlflowClient

    return MlflowClient(default_tracking_uri(output))


def parent_of(client):
    experiment = client.get_experiment_by_name("lrmc_ray")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "lrmc.trial" not in run.data.tags]
    return parent


def test_a_copy_opens_its_files_through_mlflow_when_the_first_one_is_gone(output, capsys):
    made, moved = output
    hidden = made.with_name("hidden")
    made.rename(hidden)
    try:
        assert run_command(mlflow_sync, [str(moved)]) == 0
        assert not made.exists()
        client = client_of(moved)
        parent = parent_of(client)
        path = client.download_artifacts(parent.info.run_id, "config/study.json")
        sent = moved / "mlartifacts" / parent.info.run_id / "artifacts" / "config" / "study.json"
        assert sent.read_bytes() == Path(path).read_bytes()
        assert json.loads(Path(path).read_text())["id"] == STUDY
        version = client.get_model_version("mine", "1")
        assert version.source.startswith((moved / "mlartifacts").as_uri() + "/")
        (model,) = client.search_logged_models([parent.info.experiment_id])
        assert model.tags["lrmc.directory"] == str(moved / STUDY / "best_model")
        assert model.artifact_location.startswith((moved / "mlartifacts").as_uri() + "/")
        assert client.search_model_versions("name = 'mine'")[0].version == 1
        found = addresses(moved)
        assert len(found) == 7  # an experiment, three runs, the model, and its version twice
        assert all(value.startswith((moved / "mlartifacts").as_uri()) for value in found)
    finally:
        hidden.rename(made)
    assert capsys.readouterr().out.startswith("0 runs and 0 metric values were added")


def test_the_first_one_stays_as_it_is(output):
    made, moved = output
    before = (made / "mlflow.db").read_bytes()
    known = sorted(path.relative_to(made) for path in made.rglob("*"))
    assert follow_a_move(default_tracking_uri(moved), "lrmc_ray", moved / STUDY)
    sync(moved / STUDY, default_tracking_uri(moved))
    assert (made / "mlflow.db").read_bytes() == before
    assert sorted(path.relative_to(made) for path in made.rglob("*")) == known
    assert not follow_a_move(default_tracking_uri(moved), "lrmc_ray", moved / STUDY)


def test_a_moved_model_is_registered_again_where_it_is(output):
    _, moved = output
    uri = default_tracking_uri(moved)
    assert register_model(moved / STUDY, moved / STUDY / "best_model", "other", uri) == "1"
    (version,) = client_of(moved).search_model_versions("name = 'other'")
    assert version.source.startswith((moved / "mlartifacts").as_uri() + "/")


def test_another_experiment_a_server_and_a_database_elsewhere_stay_as_they_are(output, tmp_path):
    made, moved = output
    before = addresses(moved)
    uri = default_tracking_uri(moved)
    assert not follow_a_move(uri, "of somebody else", moved / STUDY)
    assert not follow_a_move("http://127.0.0.1:9", "lrmc_ray", moved / STUDY)
    assert not follow_a_move(uri, "lrmc_ray", tmp_path / "elsewhere" / STUDY)
    assert not follow_a_move(f"sqlite:///{tmp_path}/none.db", "lrmc_ray", tmp_path / STUDY)
    assert addresses(moved) == before
    assert all(value.startswith((made / "mlartifacts").as_uri()) for value in before)


def test_only_addresses_below_the_old_folder_are_changed(output):
    made, moved = output
    old = (made / "mlartifacts").as_uri()
    with contextlib.closing(sqlite3.connect(moved / "mlflow.db")) as connection, connection:
        (run, first), (other, _), *_ = connection.execute("SELECT run_uuid, artifact_uri FROM runs")
        connection.execute(
            "UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", [old + "2/x", run]
        )
    assert follow_a_move(default_tracking_uri(moved), "lrmc_ray", moved / STUDY)
    with contextlib.closing(sqlite3.connect(moved / "mlflow.db")) as connection:
        found = dict(connection.execute("SELECT run_uuid, artifact_uri FROM runs"))
    assert found[run] == old + "2/x"
    assert found[other] == f"{(moved / 'mlartifacts').as_uri()}/{other}/artifacts"
    assert first == f"{old}/{run}/artifacts"


@pytest.mark.parametrize("name", ["outside", "mlartifacts"])
def test_a_folder_that_is_a_link_out_of_the_output_is_refused(output, tmp_path, name):
    _, moved = output
    outside = tmp_path / name
    (moved / "mlartifacts").rename(outside)
    (moved / "mlartifacts").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(DataError, match=r"must keep a study's files in .*; remove that database"):
        sync(moved / STUDY, default_tracking_uri(moved))
    assert sorted(outside.rglob("*")) == before


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path, capsys):
    study = make_study(tmp_path / "runs" / STUDY)
    (tmp_path / "runs" / "mlflow.db").write_bytes(b"no database" * 100)
    assert run_command(mlflow_sync, [str(study)]) == 6
    assert "mlflow.db must answer, but" in capsys.readouterr().err
