"""MLflow's page as a person sees it, in headless Chromium, without any other dependency."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
"""None where there is no browser; tests then skip."""

# The page's own clock, which runs ahead while nothing is loading. Its charts come last.
_PAGE_MILLISECONDS = 120_000


def compare_url(base_url: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that "Compare" leads to; its scatter plot is one click away."""
    runs = quote(json.dumps(list(run_ids), separators=(",", ":")))
    experiments = quote(json.dumps([experiment_id]))
    return f"{base_url}/#/compare-runs?runs={runs}&experiments={experiments}"


def screenshot(url: str, out_png: Path) -> None:
    """A picture of the page once it has settled, 1800 x 1400 pixels."""
    _browse(url, f"--screenshot={out_png}")


def screenshot_compare(
    base_url: str, experiment_id: str, run_ids: Sequence[str], out_png: Path
) -> None:
    """A picture of the page that compares the runs."""
    screenshot(compare_url(base_url, experiment_id, run_ids), out_png)


def page_html(url: str) -> str:
    """The page's elements once it has settled, charts included as SVG."""
    return _browse(url, "--dump-dom")


def _browse(url: str, what: str) -> str:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            CHROMIUM,
            "--headless",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--window-size=1800,1400",
            f"--user-data-dir={profile}",
            f"--virtual-time-budget={_PAGE_MILLISECONDS}",
            "--run-all-compositor-stages-before-draw",
            what,
            url,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return result.stdout
