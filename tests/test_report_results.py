"""The tables beside the packed raw results are what one command makes of them."""

import csv
import re

import pytest

from benchmarks import report_results
from benchmarks.report_results import REPORTS, RESULTS, ROOT, main


@pytest.mark.parametrize("name", ["code", "prompt_k4"])
def test_the_command_makes_the_tables_that_are_there(name, tmp_path):
    assert main([name, "--output", str(tmp_path)]) == 0
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == [f"compare_{name}.csv", f"compare_{name}.md"]
    for file in made:
        assert (tmp_path / file).read_text() == (RESULTS / file).read_text()


def test_every_archive_has_its_tables_and_every_figure_is_there():
    archives = {path.name.removesuffix(".tar.xz") for path in RESULTS.glob("*.tar.xz")}
    assert archives == {report.archive for report in REPORTS} | {report_results.TRANSFER}
    for report in REPORTS:
        table = (RESULTS / f"compare_{report.name}.md").read_text()
        assert f"from `{report.archive}.tar.xz`" in table
        assert all((ROOT / "docs" / figure).is_file() for figure in report.figures)
    transfer = (RESULTS / "transfer.md").read_text()
    assert len(re.findall(r"^\| tau 0\.", transfer, re.MULTILINE)) == 6


@pytest.mark.parametrize(("name", "most"), [("nl2sql", 3), ("nl2sql_six_seeds", 6)])
def test_the_large_comparison_has_every_method_on_as_many_seeds(name, most):
    with (RESULTS / f"compare_{name}.csv").open() as file:
        seeds = {row["method"]: int(row["seeds"]) for row in csv.DictReader(file)}
    assert len(seeds) == 42
    assert set(seeds.values()) == {3, most}
    assert seeds["sft"] == seeds["lrmc_cautious_tail_anchor"] == most


def test_an_unknown_table_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        main(["nowhere"])
    assert "no table is called nowhere; there are nl2sql, nl2sql_six_seeds, ct_radio" in (
        capsys.readouterr().err
    )
