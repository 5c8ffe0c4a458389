"""What the tests of reports share."""

import pytest
from written_run import SETTINGS, write_run

from kick.report import write_report


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of five settings and two suites with its report. Only read it."""
    root = write_run(tmp_path_factory.mktemp("report") / "run", SETTINGS, ["factoid_qa", "perplexity"])
    write_report(root)
    return root
