"""The command line in this process and in a child, and guests for it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from memslot_plugin.cli import compare, main
from memslot_plugin.tests import hosts

on_each_host = pytest.mark.parametrize("host", hosts.RUNTIMES)

GUEST = r"""(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "\10\00\00\00\0e\00\00\00") (data (i32.const 16) "hello [world]\n")
  (func (export "_start") (export "say") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "quit") (param i32) (call $exit (local.get 0)))
  (func (export "trap") unreachable)
  (func (export "random") (result i32)
    (drop (call $random (i32.const 64) (i32.const 4))) (i32.load (i32.const 64)))
  (func (export "pair") (param i32 f64) (result i32 f64) local.get 0 local.get 1)
  (func (export "wide") (param i64) (result i64) local.get 0))"""

REACTOR = """(module (memory (export "memory") 1)
  (func (export "_initialize") (i32.store (i32.const 0) (i32.const 42)))
  (func (export "answer") (result i32) (i32.load (i32.const 0))))"""


def memslot(*words):
    """Run the command in this process, at a wide terminal and with few instances, each of which reads all of smaps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "MOST_INSTANCES", 3)
        return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(word) for word in words])


def shown_by(*arguments, exit_code=0):
    """Return the readable standard output as one line."""
    result = memslot(*arguments)
    assert (result.exit_code, result.stderr) == (exit_code, ""), result.output
    return " ".join(result.stdout.split())


def json_of(command, *arguments, exit_code=0):
    return json.loads(shown_by(command, "--json", *arguments, exit_code=exit_code))


def refusal(*arguments, exit_code=2):
    """Return the sentence on standard error of a command that writes nothing else."""
    result = memslot(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert result.stderr.startswith("memslot: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("memslot: ").rstrip()


def done(*words, program=("-m", "memslot_plugin"), **options):
    """Run the command in a child; return its exit code, standard output and standard error."""
    command = [sys.executable, *program, *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    found = subprocess.run(command, text=True, timeout=120, check=False, **streams)
    return found.returncode, found.stdout, found.stderr


def run_of(host, *words, exit_code=0):
    """Return the JSON of a run of three requests."""
    return json_of("run", "--host", host, "--requests", 3, *words, exit_code=exit_code)
