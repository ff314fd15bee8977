import fast_blas  # noqa: F401, I001  before anything imports mlx.core

from files import ROOT
import re
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(ROOT))

# No test looks at the clock: a busy machine is no fault.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

# A background shell (`nohup make test &`) hands Ctrl-C down as ignored, to every child as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--skips", help="fail on a skip whose reason this file does not list")


def pytest_sessionfinish(session):
    """A test that is skipped without anybody having agreed to it is a failure."""
    file = session.config.getoption("--skips")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if file is None or reporter is None:  # a worker of xdist has no reporter
        return
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    agreed = [re.compile(line) for line in lines if line and not line.startswith("#")]
    for report in reporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not any(pattern.match(reason) for pattern in agreed):
            reporter.write_line(f"{file} does not list: {report.nodeid}: {reason}", red=True)
            session.exitstatus = 1


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
