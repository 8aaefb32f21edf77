"""pytest plugin: the three tiers of the tests, the reasons of skips, and the option --require-hosts.

pytest              T0, the README's test command: everything that carries no marker
pytest -m gate      T1, the gate: also what is marked `gate`; tests that scale try 4 times as much
pytest -m long      T2, a night or a release: what is marked `long`; tests that scale try 240 times as much

Any other expression after -m selects by marker alone. A test that scales is a property test (hypothesis) or is marked
`scales`. It belongs to each tier, and takes its number of examples from `profiles.examples`.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

TIERS = ("gate", "long")

IMPOSSIBLE = "impossible: "
"""Start of each skip reason that --require-hosts allows."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-hosts",
        metavar="HOST,HOST",
        help="fail if a test was skipped for a reason that does not begin with 'impossible: ', or if no test passed"
        " on one of these hosts (for example wasmtime,wasmer)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # Set before any test module is imported: hypothesis reads the number of examples in decorators.
    # Workers of pytest-xdist inherit the variable.
    tier = early_config.known_args_namespace.markexpr
    if tier in TIERS:
        os.environ["MEMSLOT_PROFILE"] = tier


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.option.markexpr
    if tier not in TIERS:
        return
    for item in items:
        function = getattr(item, "function", None)
        if item.get_closest_marker("scales") or getattr(function, "is_hypothesis_test", False):
            item.add_marker(tier)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        hosts = config.getoption("--require-hosts")
        config.pluginmanager.register(Skips(hosts), "skips")


class Skips:
    """The skips of the run, one line per reason. Unless `hosts` is None, a skip of a possible test fails the run."""

    def __init__(self, hosts: str | None) -> None:
        self.strict = hosts is not None
        self.missing = set(filter(None, (hosts or "").split(",")))
        self.reasons: Counter[str] = Counter()
        self.possible: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._count(report.nodeid, report.longrepr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._count(report.nodeid, report.longrepr)
        elif report.passed and report.when == "call":
            # The parameters in a test's name contain its host: [wasmtime-madvise].
            self.missing.difference_update(re.findall(r"[a-z]+", report.nodeid.partition("[")[2]))

    def _count(self, nodeid: str, where: object) -> None:
        # pytest gives a skip as a path, a line and "Skipped: " with the reason.
        reason = str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
        self.reasons[reason] += 1
        if not reason.startswith(IMPOSSIBLE):
            self.possible.append(f"{nodeid}: {reason}")

    def faults(self) -> list[str]:
        if not self.strict:
            return []
        return [f"skipped, and not impossible: {each}" for each in self.possible] + [
            f"no test passed on the required host {host}" for host in sorted(self.missing)
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.faults() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.reasons or self.faults():
            terminalreporter.section("skipped tests")
        for reason, count in self.reasons.most_common():
            terminalreporter.write_line(f"{count:5}  {reason}")
        for fault in self.faults():
            terminalreporter.write_line(f"ERROR {fault}", red=True)
