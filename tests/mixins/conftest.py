"""Fail `make mixins` when a test is skipped that `run_common_mixins.py` does not name."""

skipped: dict[str, str] = {}


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        skipped[report.nodeid.rsplit("::")[-1]] = report.longrepr[-1]


def unnamed(session):
    module = next(item.module for item in session.items)
    skips = (module.SKIPPED, module.SKIPPED_WITH_MERGING, *module.NOT_HERE.values())
    named = {name for names in skips for name in names}
    return {name: reason for name, reason in sorted(skipped.items()) if name not in named}


def pytest_sessionfinish(session, exitstatus):
    if session.items and exitstatus == 0 and unnamed(session):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    for name, reason in unnamed(terminalreporter._session).items() if skipped else ():
        terminalreporter.write_line(f"skipped, but not named in run_common_mixins.py: {name}: {reason}", red=True)
