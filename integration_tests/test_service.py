"""The example service as a process of its own, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "service" / "service.py"
SLOTS, DEADLINE = 3, 1.0
LOOP, REGEX = "for (;;);", "/(a+)+b/.exec('a'.repeat(100))"
TOO_LONG = (504, f"the script ran for more than {DEADLINE} s")
LEAVE = """
  globalThis.secret = "of a tenant"; var kept = secret; Array.prototype.last = () => secret;
  Object.prototype.left = secret; Math.random = () => secret; JSON.stringify = () => secret; secret
"""
LOOK = "[typeof secret, typeof kept, typeof [].last, typeof {}.left, typeof Math.random(), JSON.stringify(1)].join()"
NOTHING = "undefined,undefined,undefined,undefined,number,1"


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds. The deadline keeps a failure from hanging."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Service:
    """A running service; `log` is its output."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        until(self._listens, "it does not listen")

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r"running on http://127.0.0.1:(\d+)", self.log.read_text())
        self.port = int(found[1]) if found else 0
        return bool(found)

    def ask(
        self, path: str, body: str | bytes | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            encoded = body.encode() if isinstance(body, str) else body
            connection.request("GET" if body is None else "POST", path, encoded)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.headers["Content-Type"] == "application/json", text
            return answer.status, json.loads(text), answer.headers
        finally:
            connection.close()

    def evaluate(self, script: str | bytes) -> tuple[int, str]:
        status, answer, _ = self.ask("/evaluate", script)
        (said,) = answer.values()
        return status, said

    def statistics(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("/statistics")[1]
        return found

    def leased(self) -> int:
        counted = self.statistics()
        return int(counted["live_instances"] - counted["ready_instances"])

    @contextmanager
    def busy(self, *scripts: str) -> Iterator[list[tuple[int, str]]]:
        """Post each endless script repeatedly until the block ends, and yield the list of answers."""
        answers: list[tuple[int, str]] = []
        done = threading.Event()

        def client(script: str) -> None:
            while not done.is_set():
                answers.append(self.evaluate(script))

        with ThreadPoolExecutor(len(scripts)) as threads:
            ended = threads.map(client, scripts)
            try:
                until(lambda: self.leased() == len(scripts), "the scripts do not run at once")
                yield answers
            finally:
                done.set()
        list(ended)


@pytest.fixture(scope="module")
def module(quickjs: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("service") / "quickjs.wasm"
    path.write_bytes(quickjs)
    return path


@pytest.fixture(scope="module")
def running(module: Path) -> Iterator[Service]:
    """Start one service for all tests."""
    log = module.with_name("log")
    command = [sys.executable, "-W", "error", PROGRAM, "--port", "0", "--slots", str(SLOTS)]
    command += ["--deadline", str(DEADLINE)]
    environment = {**os.environ, "QUICKJS_MODULE": str(module)}
    with (
        log.open("wb") as written,
        subprocess.Popen(command, stdout=written, stderr=written, env=environment) as process,
    ):
        try:
            yield Service(process, log)
            assert "Traceback" not in log.read_text()
        finally:
            process.kill()


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the running service; fail if the test leaves a lease or the service does not evaluate."""
    yield running
    assert running.evaluate(LOOK) == (200, NOTHING)
    assert running.leased() == 0


def test_service_given_a_script_evaluates_it_in_a_reset_instance(service: Service) -> None:
    assert service.ask("/health")[:2] == (200, {"status": "ok", "value": "42"})
    assert service.evaluate("'caf\u00e9 \u2615'.toUpperCase()") == (200, "CAF\u00c9 \u2615")
    before = service.statistics()
    for _ in range(3):
        assert service.evaluate(LEAVE) == (200, "of a tenant")
        assert service.evaluate(LOOK) == (200, NOTHING)
    after = service.statistics()
    assert after["resets_in_place"] == before["resets_in_place"] + 6
    assert after["instances"] == before["instances"]
    drawn = {service.evaluate("Math.random()") for _ in range(10)}
    assert len(drawn) == 10, "each request has random numbers of its own"
    assert {status for status, _ in drawn} == {200}


def test_service_given_a_wrong_script_answers_with_its_error(service: Service) -> None:
    for script, status, said in (
        ("throw new TypeError('nothing at all')", 422, "TypeError: nothing at all"),
        ("6 *", 422, "SyntaxError"),
        ("let f = () => f() + 1; f()", 422, "call stack exhausted"),
        ("throw {toString() { throw 1; }}", 422, "gave up"),
        (b"\xff", 400, "a script is text in UTF-8"),
        ("let a = []; for (;;) a.push(new Uint8Array(1e6).fill(7))", 422, "out of memory"),
        ("new Uint8Array(1e9).length", 422, "InternalError: out of memory"),
        ("'x'.repeat(65537)", 422, "the value has more than 65536 bytes of text"),
        (" " * (2**18 + 1), 413, "a script has at most 262144 bytes"),
    ):
        answer = service.evaluate(script)
        assert answer[0] == status, answer
        assert said in answer[1]
    assert service.evaluate("'x'.repeat(65536)") == (200, "x" * 65536)
    assert service.evaluate(" " * 2**18) == (200, "undefined")


def test_service_given_endless_scripts_interrupts_them_and_serves_others(service: Service) -> None:
    began = time.monotonic()
    with service.busy(LOOP, REGEX) as answers:

        def served_while_both_ran() -> bool:
            ended = len(answers)
            ran = service.leased() == 2
            assert service.evaluate(LOOK) == (200, NOTHING)
            return ran and service.leased() == 2 and len(answers) == ended

        until(served_while_both_ran, "a script waits until another ends")
    assert set(answers) == {TOO_LONG}
    assert time.monotonic() - began >= DEADLINE


def test_service_whose_instances_are_all_in_use_sheds_load(service: Service) -> None:
    with service.busy(*[LOOP] * SLOTS) as answers:

        def shed() -> bool:
            status, answer, headers = service.ask("/evaluate", "6 * 7")
            if status == 503:
                assert answer == {"error": f"all {SLOTS} instances are in use"}
                assert int(headers["Retry-After"]) >= 1
            return status == 503

        until(shed, "it serves more scripts than it has instances")
        until(lambda: service.ask("/health")[0] == 503, "it is healthy without an instance")
    # The service also sheds a script while a request of this test has the last instance.
    assert {status for status, _ in answers} <= {504, 503}


def test_service_on_wasmer_is_refused_with_the_reason(module: Path) -> None:
    command = [sys.executable, PROGRAM, "--module", str(module), "--host", "wasmer"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "wasmer cannot interrupt a guest that runs" in " ".join(done.stderr.split())
