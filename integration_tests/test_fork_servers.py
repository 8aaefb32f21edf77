"""Servers of PyPI that fork workers from a warmed master: no request finds a secret of another."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .cells import REAL_HOSTS
from .children import ROOT, hosts

pytestmark = [
    pytest.mark.gate,
    pytest.mark.parametrize("host", hosts(REAL_HOSTS)),
]

APPLICATION = "integration_tests.fork_servers"
REQUESTS, CLIENTS = 1000, 4
REFUSED = "madvise: PAGEMAP_SCAN: Permission denied"


class Connection(http.client.HTTPConnection):
    """An HTTP connection through a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


def environment(host: str) -> dict[str, str]:
    return {**os.environ, "SERVED_BY": host, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a relative path: the name of a Unix socket has at most 107 bytes (unix(7)), and 102 for uWSGI."""
    monkeypatch.chdir(tmp_path)
    return Path("socket")


def listens(path: Path) -> bool:
    """Return True if a server accepts connections at this Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def serving(command: list[str], host: str, socket_path: Path) -> Iterator[None]:
    """Start a server, which has to answer within a minute, and end it."""
    log = socket_path.with_name("log")
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment(host), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 60
        while not listens(socket_path):  # it exists a moment earlier
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield
    except BaseException:
        print(log.read_text()[-8000:])
        raise
    finally:
        server.terminate()
        server.wait(60)


def ask(socket_path: Path) -> list[dict[str, Any]]:
    """Return the answers to all requests of some concurrent clients."""

    def client(_: int) -> list[dict[str, Any]]:
        answers = []
        for _ in range(REQUESTS // CLIENTS):
            connection = Connection(socket_path)
            connection.request("GET", "/")
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, body
            answers.append(json.loads(body))
            connection.close()
        return answers

    with ThreadPoolExecutor(CLIENTS) as clients:
        return [answer for answers in clients.map(client, range(CLIENTS)) for answer in answers]


def assert_kept_apart(answers: list[dict[str, Any]]) -> None:
    assert len(answers) == REQUESTS
    assert len({answer["process"] for answer in answers}) > 1
    assert [answer for answer in answers if answer["failed"]] == []


def executable(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        pytest.skip(f"{name} is not installed (memslot[servers])")
    return found


def test_uwsgi_with_a_warmed_master_keeps_requests_apart(host: str, path: Path) -> None:
    """By default uWSGI forks without telling Python."""
    server = [executable("uwsgi"), "--http-socket", str(path), "--master", "--processes", "4"]
    options = ["--die-on-term", "--need-app", "--home", sys.prefix]
    with serving([*server, *options, "--module", f"{APPLICATION}:application"], host, path):
        answers = ask(path)
    assert_kept_apart(answers)
    assert not any(REFUSED in each["resets_by"] for each in answers)


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_gunicorn_with_preload_keeps_requests_apart(host: str, user: str, path: Path) -> None:
    """A worker that is another user than its master cannot open its pagemap."""
    if os.geteuid():
        pytest.skip("impossible: the tests do not run as root")
    server = [executable("gunicorn"), "--bind", f"unix:{path}", "--preload", "--workers", "4"]
    options = ["--user", user] if user == "root" else ["--user", user, "--group", "nogroup"]
    with serving([*server, *options, f"{APPLICATION}:application"], host, path):
        answers = ask(path)
    assert_kept_apart(answers)
    assert all((REFUSED in each["resets_by"]) == (user == "nobody") for each in answers)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_keeps_requests_apart(host: str, method: str) -> None:
    program = f"from {APPLICATION} import multiprocess; multiprocess({method!r})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=ROOT,
        env=environment(host),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_kept_apart(json.loads(done.stdout))
