"""What the tests share."""
import os
import re
from pathlib import Path

import pytest

MISSING_PACKAGE = re.compile(r"could not import|No module named|pip install")


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder of real data sets; tests that need it are skipped where `GEOLAB_REAL_DATA` does not name it."
    folder = os.environ.get("GEOLAB_REAL_DATA")
    if not folder: pytest.skip("GEOLAB_REAL_DATA is not set")
    assert Path(folder).is_dir(), f"GEOLAB_REAL_DATA={folder} is not a folder"
    return Path(folder)


def refuse_skip(report):
    "`dev` has every extra, so a test skipped for a missing package hides a broken install: it fails."
    if report.skipped and not hasattr(report, "wasxfail") and MISSING_PACKAGE.search(str(report.longrepr)):
        report.outcome, report.longrepr = "failed", f"skipped for a missing package: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return refuse_skip((yield))
