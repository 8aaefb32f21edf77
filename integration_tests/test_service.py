"""The example service as a process of its own, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from .cells import backends

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "service" / "service.py"
SLOTS, DEADLINE = 3, 2.0
LEAVE = """
  globalThis.secret = "of a tenant"; var kept = secret; Array.prototype.last = () => secret;
  Object.prototype.left = secret; Math.random = () => secret; JSON.stringify = () => secret; secret
"""
LOOK = "[typeof secret, typeof kept, typeof [].last, typeof {}.left, typeof Math.random(), JSON.stringify(1)].join()"
NOTHING = "undefined,undefined,undefined,undefined,number,1"


class Service:
    """A running service; `log` is what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.port = 0

    def wait_until_it_listens(self) -> None:
        for _ in range(1000):
            found = re.search(r"running on http://127.0.0.1:(\d+)", self.log.read_text())
            if found:
                self.port = int(found[1])
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"it does not listen: {self.log.read_text()}")

    def ask(
        self, path: str, body: str | bytes | None = None
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
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

    @contextmanager
    def busy(self, count: int) -> Iterator[list[tuple[int, str]]]:
        """`count` endless loops; what became of them is there at the end of the block."""
        answers: list[tuple[int, str]] = []
        threads = [
            threading.Thread(target=lambda: answers.append(self.evaluate("for (;;);")))
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        leased = 0
        while leased < count:
            counted = self.statistics()
            leased = counted["live_instances"] - counted["ready_instances"]
            assert not answers, "one ended before the last began"
        try:
            yield answers
        finally:
            for thread in threads:
                thread.join()


@contextmanager
def started(backend: str, module: Path, log: Path, deadline: float = DEADLINE) -> Iterator[Service]:
    command = [sys.executable, "-W", "error", PROGRAM, "--port", "0", "--slots", str(SLOTS)]
    command += ["--deadline", str(deadline)]
    environment = {**os.environ, "MEMSLOT_PLUGINS": backend, "QUICKJS_MODULE": str(module)}
    with (
        log.open("wb") as written,
        subprocess.Popen(command, stdout=written, stderr=written, env=environment) as process,
    ):
        try:
            service = Service(process, log)
            service.wait_until_it_listens()
            yield service
        finally:
            process.kill()


@pytest.fixture(scope="module")
def module(quickjs: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("service") / "quickjs.wasm"
    path.write_bytes(quickjs)
    return path


@pytest.fixture(scope="module", params=backends())
def service(request: pytest.FixtureRequest, module: Path) -> Iterator[Service]:
    """One for all tests, which must leave it as it was."""
    log = module.with_name(f"{request.param}.log")
    with started(request.param, module, log) as running:
        yield running
        assert "Traceback" not in log.read_text()


@pytest.fixture(autouse=True)
def _serves_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test nothing is leased, and scripts are evaluated."""
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        assert service.evaluate(LOOK) == (200, NOTHING)
        counted = service.statistics()
        assert counted["live_instances"] == counted["ready_instances"]


def test_it_evaluates_scripts(service: Service) -> None:
    assert service.evaluate("6 * 7") == (200, "42")
    assert service.evaluate("[3, 1, 2].sort().join()") == (200, "1,2,3")
    assert service.evaluate("'caf\u00e9 \u2615'.toUpperCase()") == (200, "CAF\u00c9 \u2615")
    assert service.ask("/health")[:2] == (200, {"status": "ok", "value": "42"})


def test_no_request_sees_what_another_left(service: Service) -> None:
    for _ in range(5):
        assert service.evaluate(LEAVE) == (200, "of a tenant")
        assert service.evaluate(LOOK) == (200, NOTHING)
    before = service.statistics()
    assert service.evaluate("1") == (200, "1")
    after = service.statistics()
    assert after["resets_in_place"] == before["resets_in_place"] + 1
    assert after["instances"] == before["instances"], "it is the same instance, reset"


def test_every_request_draws_its_own_random_numbers(service: Service) -> None:
    drawn = [service.evaluate("Math.random()") for _ in range(10)]
    assert {status for status, _ in drawn} == {200}
    assert len({value for _, value in drawn}) == 10


def test_what_a_script_does_wrong_is_said(service: Service) -> None:
    for script, said in (
        ("throw new TypeError('nothing at all')", "TypeError: nothing at all"),
        ("6 *", "SyntaxError"),
        ("let f = () => f() + 1; f()", "call stack exhausted"),
        ("throw {toString() { throw 1; }}", "gave up"),
    ):
        status, answer = service.evaluate(script)
        assert status == 422, answer
        assert said in answer
    assert service.evaluate(b"\xff") == (400, "a script is text in UTF-8")


def test_an_endless_loop_is_interrupted_and_others_are_served_meanwhile(service: Service) -> None:
    for script in ("for (;;);", "/(a+)+b/.exec('a'.repeat(100))"):
        began = time.monotonic()
        assert service.evaluate(script) == (504, f"the script ran for more than {DEADLINE} s")
        assert DEADLINE <= time.monotonic() - began < DEADLINE + 10
        assert service.evaluate(LOOK) == (200, NOTHING)
    with service.busy(1) as answers:
        assert service.evaluate("6 * 7") == (200, "42")
        assert answers == [], "it came first"
    assert answers == [(504, f"the script ran for more than {DEADLINE} s")]


def test_memory_and_output_are_limited(service: Service) -> None:
    for bomb in (
        "let a = []; for (;;) a.push(new Uint8Array(1e6).fill(7))",
        "new Uint8Array(1e9).length",
    ):
        assert service.evaluate(bomb) == (422, "InternalError: out of memory")
        assert service.evaluate(LOOK) == (200, NOTHING)
    assert service.evaluate("'x'.repeat(65536).length") == (200, "65536")
    assert service.evaluate("'x'.repeat(65536)") == (200, "x" * 65536)
    assert service.evaluate("'x'.repeat(65537)") == (
        422,
        "the value has more than 65536 bytes of text",
    )
    assert service.evaluate(" " * 2**18) == (200, "undefined")
    assert service.evaluate(" " * (2**18 + 1)) == (413, "a script has at most 262144 bytes")


def test_it_sheds_load_when_every_instance_is_in_use(service: Service) -> None:
    with service.busy(SLOTS) as answers:
        status, answer, headers = service.ask("/evaluate", "6 * 7")
        assert (status, answer) == (503, {"error": f"all {SLOTS} instances are in use"})
        assert int(headers["Retry-After"]) >= 1
        assert service.ask("/health")[0] == 503
    assert [status for status, _ in answers] == [504] * SLOTS
    assert service.evaluate("6 * 7") == (200, "42")


def test_many_clients_get_their_own_answers_and_nothing_grows(service: Service) -> None:
    answers: list[tuple[int, tuple[int, str]]] = []

    def client(first: int) -> None:
        for number in range(first, first + 20):
            script = f"var mine = (globalThis.mine || 0) + {number}; mine"
            answer = service.evaluate(script)
            for _ in range(1000):
                if answer[0] != 503:
                    break
                time.sleep(0.01)
                answer = service.evaluate(script)
            answers.append((number, answer))

    def flood() -> None:
        threads = [threading.Thread(target=client, args=(100 * place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def held() -> tuple[int, int]:
        """Descriptors without sockets, which may be open a little longer than their clients', and mappings."""
        process = Path(f"/proc/{service.process.pid}")
        names = []
        for link in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                names.append(str(link.readlink()))
        mappings = len((process / "maps").read_text().splitlines())
        return sum(not name.startswith("socket:") for name in names), mappings

    flood()
    before = held()
    flood()
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 8
    assert len(answers) == 240
    for number, answer in answers:
        assert answer == (200, str(number))


def test_it_ends_on_a_signal_once_everybody_has_an_answer(module: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(backends()[0], module, log) as service, service.busy(1) as answers:
        service.process.send_signal(signal.SIGTERM)
        # The server ends the process by the signal that it was sent, when it has cleaned up.
        assert service.process.wait(60) in (0, -signal.SIGTERM)
    assert answers == [(504, f"the script ran for more than {DEADLINE} s")]
    assert "Application shutdown complete" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "wasmer"], "wasmer cannot interrupt a guest that runs"),
        (["--module", "/nonexistent.wasm"], "does not exist"),
        (["--slots", "0"], "not in the range"),
    ],
)
def test_what_it_cannot_do_is_said_at_once(module: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, PROGRAM, "--module", str(module), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
