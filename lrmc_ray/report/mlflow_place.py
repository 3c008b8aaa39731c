"""Where MLflow keeps a study's files: beside the database in an output directory, wherever it is.

MLflow writes absolute addresses into its database. A directory that was moved or copied would send
its files to the place where it was, and MLflow's page would look for them there.
"""

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlparse

from lrmc_ray.errors import DataError

ARTIFACTS = "mlartifacts"
"""The folder of MLflow's files, beside its database."""

_ADDRESSES = (
    ("runs", "artifact_uri", "experiment_id = :id"),
    ("logged_models", "artifact_location", "experiment_id = :id"),
    ("model_versions", "source", "run_id IN (SELECT run_uuid FROM runs WHERE experiment_id = :id)"),
    (
        *("model_versions", "storage_location"),
        "run_id IN (SELECT run_uuid FROM runs WHERE experiment_id = :id)",
    ),
    ("experiments", "artifact_location", "experiment_id = :id"),
)
"""Table, column and rows of MLflow's database that say where files of an experiment are."""


def database_of(tracking_uri: str) -> Path | None:
    """The file of an SQLite database; None for a server."""
    name = tracking_uri.removeprefix("sqlite:///")
    return None if name == tracking_uri else Path(name)


def artifacts_beside(database: Path) -> str:
    """The address of the files that belong to a database."""
    return (database.absolute().parent / ARTIFACTS).as_uri()


def follow_a_move(tracking_uri: str, experiment: str, study_dir: Path) -> bool:
    """Let an output directory's database look for an experiment's files where it is itself.

    Only addresses in a folder ``mlartifacts`` of the same file system are changed: those that this
    project gives. A server, and a database that is not in the output directory, stay as they are.

    Args:
        tracking_uri: of MLflow.
        experiment: its name.
        study_dir: of the study, in the output directory.

    Returns:
        Whether anything was changed.

    Raises:
        sqlite3.Error: the file is no database, or another process holds it.
    """
    database = database_of(tracking_uri)
    output = study_dir.resolve().parent
    if database is None or not database.is_file() or database.resolve().parent != output:
        return False
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        known = {name for (name,) in tables}
        if not known >= {"experiments", "runs"}:
            return False
        row = connection.execute(
            "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?", (experiment,)
        ).fetchone()
        if row is None or not _is_elsewhere(str(row[1]), output):
            return False
        old, new = str(row[1]).rstrip("/"), artifacts_beside(output / "mlflow.db")
        values = {"id": row[0], "new": new, "old": old, "length": len(old)}
        with connection:
            for table, column, rows in _ADDRESSES:
                if table in known:
                    connection.execute(
                        f"UPDATE {table} SET {column} = :new || substr({column}, :length + 1) "
                        f"WHERE {rows} AND ({column} = :old OR "
                        f"substr({column}, 1, :length + 1) = :old || '/')",
                        values,
                    )
    return True


def _is_elsewhere(address: str, output: Path) -> bool:
    """Whether it is a folder of ours, in another directory than ``output``."""
    folder = _folder(address)
    return (
        folder is not None
        and folder.name == ARTIFACTS
        and folder.resolve() != (output / ARTIFACTS).resolve()
    )


def _folder(address: str) -> Path | None:
    """The path of an address of this machine; None for any other."""
    place = urlparse(address)
    return Path(unquote(place.path)) if place.scheme in ("", "file") else None


def check_kept_within(artifact_uri: str, tracking_uri: str, study_dir: Path) -> None:
    """Refuse to copy files to where a database that came with an output directory points.

    Args:
        artifact_uri: where MLflow keeps a run's files.
        tracking_uri: of MLflow; a server, or a database elsewhere, is the user's own choice.
        study_dir: of the study, in the output directory.

    Raises:
        DataError: they would be written outside of the output directory.
    """
    output = study_dir.resolve().parent
    database = database_of(tracking_uri)
    if database is None or database.resolve().parent != output:
        return
    folder = _folder(artifact_uri)
    if folder is None or not folder.resolve().is_relative_to(output):
        raise DataError(
            f"MLflow must keep a study's files in {output}, {database} says {artifact_uri}; remove "
            f"that database, and run `lrmc mlflow-sync {study_dir}`, which makes a new one"
        )
