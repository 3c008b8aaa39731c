"""The description in MLflow is Markdown that the page renders: names in it must stay names."""

import html

import pytest
from markdown_it import MarkdownIt

from lrmc_ray.report.mlflow_note import study_note
from lrmc_ray.report.study import load_study
from tests.support.synthetic_study import add_final, edit, make_study, rename_task


def rendered(note):
    """As a page shows it that lets HTML and pictures through."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(note)


def finished(directory):
    directory.mkdir(parents=True)
    add_final(make_study(directory))
    edit(directory, state="FINISHED", trials={9: {"state": "FAIL"}})
    return directory


@pytest.mark.parametrize(
    "name",
    [
        "![p](http://127.0.0.1:9/p.png)",
        "<img src=http://127.0.0.1:9/p.png>",
        "\\![p](http://127.0.0.1:9/p.png)",
        "`</code><img src=x>`![p][p]",
        "[here](http://127.0.0.1:9)",
    ],
)
def test_the_name_of_a_task_loads_no_picture_and_links_to_nothing(tmp_path, name):
    directory = finished(tmp_path / "demo-0123")
    rename_task(directory, "nl2sql", name)
    page = rendered(study_note(load_study(directory)))
    assert page.count("<img") == 1  # our figure
    assert 'src="get-artifact?path=gain_vs_forgetting.png' in page
    assert "<a" not in page
    assert name in html.unescape(page)


def test_a_directory_cannot_end_its_own_quotation(tmp_path):
    directory = finished(tmp_path / "a`![p](http:" / "127.0.0.1:9" / "p.png)`" / "demo-0123")
    page = rendered(study_note(load_study(directory)))
    assert page.count("<img") == 1
    assert page.count("<code>") == 2  # report.html, and the directory
