"""A service that evaluates untrusted JavaScript: each request in an instance that no other request has touched.

    python examples/service/service.py --module quickjs.wasm
    curl --data '[3, 1, 2].sort().join()' http://127.0.0.1:8000/evaluate

QuickJS boots once, before the snapshot that every instance starts from.  A reset restores the pages that the script
wrote, and no others.  So a request costs its script, and about 50 us.

README.md beside this file says where the module comes from, and lists the limits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import click
import quickjs
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import memslot_plugin as memslot

TICKS = 10
"""Ticks of the clock within a deadline."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request: seconds, and bytes of linear memory, of the script, and of its value."""

    deadline: float = 1.0
    memory: int = 32 * 2**20
    script: int = 2**18
    output: int = 2**16


class Sandbox:
    """The host with its guest, and a clock that interrupts long scripts."""

    def __init__(self, module: Path, slots: int, limits: Limits) -> None:
        self.limits = limits
        self.host = memslot.open_host(
            "wasmtime",
            slots=slots,
            ready_instances=slots,
            memory_limit=limits.memory,
            plugins=[quickjs.Seeds()],
            configure=lambda config: setattr(config, "epoch_interruption", True),
            # Called again with each lease.  One tick more, because the clock may tick right now.
            configure_store=lambda store: store.set_epoch_deadline(TICKS + 1),
        )
        self.guest = self.host.prepare(
            module,
            imports=quickjs.IMPORTS,
            wasi=memslot.Wasi(stdout="discard", stderr="discard"),
            init=quickjs.boot,
            name="quickjs",
        )

    def evaluate(self, instance: memslot.Instance, script: str) -> JSONResponse:
        """Return the answer to one script; runs in a thread, because a script may take long."""
        try:
            return JSONResponse({"value": quickjs.run(instance, script, limit=self.limits.output)})
        except quickjs.ScriptError as error:
            return refusal(422, str(error))
        except quickjs.OutputTooLarge:
            return refusal(422, f"the value has more than {self.limits.output} bytes of text")
        except memslot.GuestTrap as trap:
            if "interrupt" in str(trap):
                return refusal(504, f"the script ran for more than {self.limits.deadline} s")
            return refusal(422, str(trap))  # a stack overflow, for example
        except memslot.MemslotError as error:  # a script that broke the interpreter itself
            return refusal(422, str(error))

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Let the epoch of wasmtime's engine move on while the block runs."""
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(self.limits.deadline / TICKS):
                self.host.increment_epoch()

        clock = threading.Thread(target=tick, name="epochs")
        clock.start()
        try:
            yield
        finally:
            stop.set()
            clock.join()


async def evaluate(request: Request) -> JSONResponse:
    """POST /evaluate, with a script as the body."""
    sandbox: Sandbox = request.app.state.sandbox
    script = b""
    async for part in request.stream():
        script += part
        if len(script) > sandbox.limits.script:
            return refusal(413, f"a script has at most {sandbox.limits.script} bytes")
    try:
        text = script.decode()
    except UnicodeDecodeError:
        return refusal(400, "a script is text in UTF-8")
    try:
        # Leased here and not in the thread: a request that gets no instance is answered at once, and does not wait.
        with sandbox.guest.lease() as instance:
            return await run_in_threadpool(sandbox.evaluate, instance, text)
    except memslot.PoolExhausted as error:
        return refusal(503, f"all {error.limit} instances are in use", {"Retry-After": "1"})


async def health(request: Request) -> JSONResponse:
    """GET /health: 200 if a script can be evaluated at this moment."""
    try:
        with request.app.state.sandbox.guest.lease() as instance:
            return JSONResponse({"status": "ok", "value": quickjs.run(instance, "6 * 7")})
    except memslot.PoolExhausted:
        return refusal(503, "busy", {"Retry-After": "1"})


async def statistics(request: Request) -> JSONResponse:
    """GET /statistics: the host's counters."""
    return JSONResponse(dataclasses.asdict(request.app.state.sandbox.host.statistics()))


def refusal(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": error}, status, headers)


def application(module: Path, slots: int, limits: Limits) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sandbox = app.state.sandbox = Sandbox(module, slots, limits)
        with sandbox.ticking():
            yield
        sandbox.host.close()  # raises InUse if an instance is still leased

    routes = [
        Route("/evaluate", evaluate, methods=["POST"]),
        Route("/health", health),
        Route("/statistics", statistics),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


@click.command()
@click.option(
    "--module",
    envvar="QUICKJS_MODULE",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("--host", default="wasmtime", type=click.Choice(["wasmtime", "wasmer"]))
@click.option("--port", default=8000, show_default=True, help="0: one that is free")
@click.option(
    "--slots",
    default=16,
    show_default=True,
    type=click.IntRange(1, 40),  # as many as Starlette has threads
    help="scripts at once; the next gets 503",
)
@click.option(
    "--deadline",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.01, 60),
    help="seconds for a script",
)
def main(module: Path, host: str, port: int, slots: int, deadline: float) -> None:
    """Evaluate untrusted JavaScript over HTTP, on this machine only."""
    if host == "wasmer":
        raise click.UsageError(
            "wasmer cannot interrupt a guest that runs, so one endless loop of untrusted code would stop"
            " the service; use wasmtime"
        )
    uvicorn.run(application(module, slots, Limits(deadline)), host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()
