"""Judges the matrix: every leg ran, on every host it promised, and skipped nothing that was possible.

usage: check_legs.py RESULTS TIMED-LEG[,TIMED-LEG] LEG=[HOST[,HOST]] ...

RESULTS holds what .ci/run wrote: for each leg a JUnit file `LEG.xml`, for each timed one the serial pass of its timing
tests `LEG.timing.xml`, and beside each the exit status in `.rc`. A skip is allowed where its reason begins with
"impossible:" (and is listed); any other is a test that should have run.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

NO_TESTS_COLLECTED = 5  # pytest's exit status; a suite need not have timing tests


@dataclass
class Leg:
    """What one Python did with one suite, both passes together."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    hosts: set[str] = field(default_factory=set)
    timing_passed: int = 0
    seconds: float = 0.0
    impossible: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def outcome(case: ET.Element) -> tuple[str, str]:
    """How a test ended and, where it did not run, why."""
    for kind in ("error", "failure"):
        if (found := case.find(kind)) is not None:
            return "failed", (found.get("message") or "").partition("\n")[0]
    if (found := case.find("skipped")) is None:
        return "passed", ""
    if found.get("type") == "pytest.xfail":
        return "xfailed", found.get("message") or ""
    # A skipped module says "collection skipped" and has the reason in its text: ('path', line, 'Skipped: reason').
    in_text = re.search(r"Skipped: (.*?)['\"]\)$", found.text or "")
    message = found.get("message") or ""
    return "skipped", in_text[1] if message == "collection skipped" and in_text else message


def read(leg: Leg, path: Path, *, timing: bool) -> None:
    """Adds one JUnit file to its leg."""
    if not path.exists():
        leg.faults.append(f"{path.name} is missing: the leg did not run to its end")
        return
    status_path = path.with_suffix(".rc")
    status = int(status_path.read_text()) if status_path.exists() else None
    if status != 0 and not (timing and status == NO_TESTS_COLLECTED):
        leg.faults.append(f"pytest's exit status in {path.name} is {status}")
    for suite in ET.parse(path).getroot().iter("testsuite"):
        leg.seconds += float(suite.get("time", 0))
        for case in suite.iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            end, reason = outcome(case)
            leg.outcomes[end] += 1
            if end == "passed":
                leg.timing_passed += timing
                leg.hosts.update(re.findall(r"[a-z]+", name.partition("[")[2]))
            elif end == "failed":
                leg.faults.append(f"failed: {name}: {reason}")
            elif end == "skipped" and reason.startswith("impossible:"):
                leg.impossible[reason] += 1
            elif end == "skipped":
                leg.faults.append(f"skipped: {name}: {reason}")


def judge(results: Path, name: str, hosts: list[str], *, timed: bool) -> Leg:
    """Reads a leg's files and says what is wrong with it."""
    leg = Leg(name)
    read(leg, results / f"{leg.name}.xml", timing=False)
    if not leg.outcomes["passed"]:
        leg.faults.append("no test passed")
    if timed:
        read(leg, results / f"{leg.name}.timing.xml", timing=True)
    # The parameters in a test's name say which host it used: [wasmtime-madvise].
    leg.faults += [f"no test passed on {host}" for host in hosts if host not in leg.hosts]
    return leg


def main() -> int:
    """Prints the table and what is wrong; 0 if nothing is."""
    results, timed = Path(sys.argv[1]), sys.argv[2].split(",")
    expected = dict(argument.split("=") for argument in sys.argv[3:])
    legs = [
        judge(results, leg, hosts.split(",") if hosts else [], timed=leg in timed)
        for leg, hosts in expected.items()
    ]
    print(
        f"{'leg':<16}{'passed':>8}{'failed':>8}{'skipped':>8}{'xfailed':>8}{'seconds':>9}  verdict"
    )
    for leg in legs:
        counts = "".join(
            f"{leg.outcomes[kind]:>8}" for kind in ("passed", "failed", "skipped", "xfailed")
        )
        print(f"{leg.name:<16}{counts}{leg.seconds:>9.1f}  {'FAILED' if leg.faults else 'ok'}")
    impossible: Counter[str] = sum((leg.impossible for leg in legs), Counter())
    for reason, count in sorted(impossible.items()):
        print(f"allowed skip, {count} times: {reason}")
    faults = [f"{leg.name}: {fault}" for leg in legs for fault in leg.faults]
    if not any(leg.timing_passed for leg in legs):
        faults.append("no timing test passed in any leg")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
