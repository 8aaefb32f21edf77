"""Names that a guest, a file or a caller chose: escaped before they reach a terminal or a log."""

from __future__ import annotations

import io
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import memslot_plugin as memslot
from memslot_plugin import errors
from memslot_plugin.cli import main
from memslot_plugin.cli.output import progress
from memslot_plugin.errors import printable
from memslot_plugin.tests import hosts
from memslot_plugin.wasm import binary as wasm

EVIL = "\x1b[31mred\x07\r\nCRITICAL \x9b2J\u202e\udcff"
SHOWN = r"\x1b[31mred\x07 CRITICAL \x9b2J\u202e\udcff"
NAME = r"\1b[31mred\07\0d\0aCRITICAL"
TEXT = f"""(module (import "{NAME}" "{NAME}" (func)) (memory (export "{NAME}") 1) (table 1 funcref)
  (func (export "{NAME}2") (drop (table.grow (ref.null func) (i32.const 1)))))"""


FUNCTION_NAME = r"\01\0b\01\00\08\1b[31mred"
"""Return a name section that gives function 0 this name."""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_becomes_one_line_that_does_nothing_to_a_terminal() -> None:
    assert printable(EVIL) == SHOWN
    assert printable(SHOWN) == SHOWN
    assert printable("a  b\n\n   c\td\n") == r"a  b c\td"
    assert printable("Grüße, 世界 🦀") == "Grüße, 世界 🦀"


# Quadratic steps would take minutes.


@pytest.mark.parametrize("text", [" ", "\n", "\n "])
def test_long_text_becomes_one_line_in_linear_steps(text: str) -> None:
    assert printable(f"a{text * 500_000}\x1b").strip(" a") == r"\x1b"


@pytest.mark.parametrize("name", hosts.RUNTIMES)
@pytest.mark.parametrize("text", [" ", "\n", "\n ", " (", "[1"])
def test_trap_in_a_function_with_a_long_name_is_raised_in_linear_steps(
    name: str, text: str
) -> None:
    function = b"\1\0" + wasm.encode_name(text * (99_000 // len(text)))
    names = wasm.encode_name("name") + b"\1" + wasm.unsigned_leb128(len(function)) + function
    module = hosts.assemble('(module (memory 1) (data "x") (func (export "f") unreachable))')
    module += b"\0" + wasm.unsigned_leb128(len(names)) + names
    with hosts.serving(name) as host, host.prepare(module).instantiate() as instance:
        with pytest.raises(memslot.GuestTrap) as raised:
            instance.call("f")
        assert pickle.loads(pickle.dumps(raised.value)).args == raised.value.args


@pytest.mark.parametrize("kind", [errors.GuestTrap, errors.SystemCallError, errors.PoolTimeout])
def test_message_of_an_error_is_printable(kind: Any) -> None:
    error = kind(7, EVIL) if kind is errors.SystemCallError else kind(EVIL)
    assert SHOWN in str(error)
    assert kind is not errors.SystemCallError or (error.errno, error.strerror) == (7, SHOWN)


@pytest.mark.parametrize("name", hosts.HOSTS)
def test_names_in_refusals_reports_and_logs_are_printable(name: str, tmp_path: Path) -> None:
    with hosts.serving(name) as host:
        guest = host.prepare(hosts.assemble(TEXT), name=EVIL)
        assert (guest.name, repr(guest)[:40]) == (SHOWN, f"<Guest {SHOWN}"[:40])
        for reason in (*guest.report.verdict.reasons, *guest.report.changes):
            assert reason.isprintable()
        for call in (
            guest.instantiate,
            lambda: host.prepare(f"/nowhere/{EVIL}"),
            lambda: host.load(f"/nowhere/{EVIL}"),
        ):
            if name == "fake" and call == guest.instantiate:
                continue  # the fake host links no import
            with pytest.raises(memslot.MemslotError) as raised:
                call()
            assert str(raised.value).isprintable()
            assert "[31mred" in str(raised.value)


@pytest.mark.parametrize("name", hosts.RUNTIMES)
def test_tracebacks_of_traps_and_refusals_are_printable(name: str) -> None:
    texts = (
        f'(module (memory 1) (func $f (export "f") unreachable) (@custom "name" "{FUNCTION_NAME}"))',
        f'(module (memory 1) (export "{NAME}" (memory 0)) (export "{NAME}" (memory 0)))',
        f'(module (memory 1) (import "{NAME}" "{NAME}" (func)))',
        "(module (memory 1) \x1b[31mred",
    )
    with hosts.serving(name) as host:
        for text in texts:
            with pytest.raises(memslot.MemslotError) as raised:
                host.prepare(text).instantiate().call("f")
            if isinstance(raised.value, memslot.GuestTrap):
                assert "[31mred" in getattr(raised.value, "message", str(raised.value))
            for printed in (
                *traceback.format_exception(type(raised.value), raised.value, None),
                getattr(raised.value, "message", ""),
            ):
                assert printed.replace("\n", "").isprintable()


def test_command_given_hostile_names_prints_them_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "guest.wasm"
    file.write_bytes(hosts.assemble(TEXT))
    shown = CliRunner().invoke(main, ["inspect", str(file)], color=True)
    assert shown.exit_code == 0
    assert r"\x1b[31mred\x07 CRITICAL" in shown.output
    assert not {"\x1b", "\x07", "\r"} & set(shown.output)
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress() as say:
        say(f"{EVIL} [bold]")
    assert r"\x1b[31mred" in screen.getvalue()
    assert "[bold]" in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue()
