"""The plan for a guest: memories with an image, segments that stay, and the reasons."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from memslot_hooks.types import InitialContent
from memslot_plugin import wasm
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.guest import plan as guest
from memslot_plugin.guest.report import report_on
from memslot_plugin.guest.target import Target
from memslot_plugin.memory import image as images
from memslot_plugin.settings import Settings
from memslot_plugin.tests.encode import END, HEADER, custom, name, section, signed, unsigned, vector

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles the guests")

PAGE = wasm.WASM_PAGE
GIB = 1 << 30


def plan_of(text: str | bytes, *, image_limit: int = GIB, **options: Any) -> guest.Plan:
    """Return the plan for a module, by default with images of any size and no other changes."""
    source = bytes(wasmtime.wat2wasm(text)) if isinstance(text, str) else text
    options = {"import_memory": False} | options
    return guest.plan(source, Target(Settings(image_limit=image_limit), **options))


@pytest.mark.parametrize(
    ("text", "sizes", "import_memory"),
    [
        ('(func (export "f"))', [], False),
        ('(func (export "f"))', [], True),
        ("(memory 0)", [0], False),
        ("(memory 1)", [PAGE], False),
        ('(import "a" "b" (memory 1 2 shared))', [PAGE], False),
        ('(import "a" "b" (memory 1 2 shared))', [PAGE], True),
    ],
)
def test_module_that_needs_no_change_is_left_alone(
    text: str, sizes: list[int], *, import_memory: bool
) -> None:
    plan = plan_of(f"(module {text})", import_memory=import_memory)
    assert plan.module is plan.source
    assert (plan.native, plan.import_name) == (None, None)
    assert [memory.minimum_bytes for memory in plan.memories] == sizes
    for memory in plan.memories:
        if memory.imported is None:
            assert plan.contents[memory.index] == InitialContent(memory.minimum_bytes, ())


def test_content_of_an_image_is_the_active_segments_in_order() -> None:
    plan = plan_of(
        """(module (memory (export "memory") 2 5)
             (data (i32.const 8) "first") (data "passive") (data (i32.const 3) "")
             (data (i32.const 10) "later") (data (i32.const 131071) "z"))"""
    )
    (memory,) = plan.memories
    segments = [(s.offset, s.data) for s in plan.contents[0].segments]
    assert segments == [(8, b"first"), (10, b"later"), (131071, b"z")]
    assert plan.contents[0].byte_size == memory.minimum_bytes == 2 * PAGE
    assert (memory.maximum_bytes, memory.exported_as) == (5 * PAGE, ("memory",))
    assert (memory.segment_count, memory.data_bytes, memory.reason) == (4, 11, None)
    assert [bytes(s.data) for s in wasm.parse(plan.module).data_segments] == [b"passive"]


def test_segment_that_code_may_name_keeps_its_index() -> None:
    text = """(module (memory (export "memory") 2)
             (data (i32.const 8) "first") (data $p "passive") (data $n (i32.const 3) "named")
             (data (i32.const 10) "later") (data (i32.const 131071) "z")
             (func (export "use") (memory.init $n (i32.const 0) (i32.const 0) (i32.const 0)){}))"""
    for more, kept in ("", 3), ("(data.drop 3)", 4):
        plan = plan_of(text.format(more))
        rewritten = wasm.parse(plan.module)
        sizes, offsets = [0, 7, 0, 0], [8, None, 3, 10]
        assert [len(s.data) for s in rewritten.data_segments] == sizes[:kept]
        assert [s.offset and s.offset.value for s in rewritten.data_segments] == offsets[:kept]


def test_code_that_is_not_understood_may_name_every_segment() -> None:
    source = wasmtime.wat2wasm(
        '(module (memory 1) (data (i32.const 8) "first") (func (drop (i32.const 65))))'
    )
    unknown = bytes(source).replace(b"\x41\xc1\x00\x1a", b"\xff\xc1\x00\x1a")
    assert unknown != source
    plan = plan_of(unknown)
    assert plan.code is not None
    assert (plan.code.named_segments, plan.memories[0].reason) == (None, None)
    assert [len(s.data) for s in wasm.parse(plan.module).data_segments] == [0]


IMAGELESS = {
    """(import "env" "base" (global i32)) (memory 1) (data (i32.const 0) "a")
       (data (global.get 0) "b")""": (
        "The offset of data segment 1 is global 0, which is imported; place it at a constant"
    ),
    '(memory 1) (data (i32.const 65530) "a") (data (i32.const 65530) "sevenby")': (
        "Data segment 1 ends at byte 65537 and the memory starts with 65536, so instantiation traps"
    ),
    '(import "env" "memory" (memory 1)) (data (i32.const 0) "a")': (
        "It is imported as env.memory and belongs to the embedder"
    ),
}


@pytest.mark.parametrize("import_memory", [False, True])
@pytest.mark.parametrize(("text", "reason"), IMAGELESS.items())
def test_memory_without_an_image_keeps_its_segments_and_says_why(
    text: str, reason: str, *, import_memory: bool
) -> None:
    plan = plan_of(f"(module {text})", import_memory=import_memory)
    (memory,) = plan.memories
    assert (memory.image, plan.contents) == (False, {})
    assert memory.reason is not None
    assert memory.reason.startswith(reason)
    assert memory.reason.endswith(".")
    assert plan.native is None
    assert (plan.import_name is not None) == (import_memory and memory.imported is None)
    before, after = wasm.parse(plan.source), wasm.parse(plan.module)
    assert before.data_segments == after.data_segments
    assert not plan.verdict.in_place
    if memory.imported is None:
        said = "Memory 0 has no image, so that only a new instance copies its data again."
        assert plan.verdict.reasons[0].startswith(said)
    assert (report_on(plan).verdict, report_on(plan).code) == (plan.verdict, plan.code)


def test_image_past_the_limit_is_refused_with_both_numbers() -> None:
    text = """(module (memory 3) (data (i32.const 131000) "b") (data (i32.const 65536) "a")
      (data (i32.const 0) ""))"""  # the empty one does not widen the image
    assert plan_of(text, image_limit=65465).memories[0].image
    (memory,) = plan_of(text, image_limit=65464).memories
    assert memory.reason == (
        "Its image spans 65465 bytes and the limit is 65464; raise the setting image_limit."
    )


def test_memory_without_a_plugin_for_images_keeps_its_segments() -> None:
    plan = plan_of('(module (memory 1) (data (i32.const 8) "abc"))', builds_images=False)
    assert plan.module is plan.source
    assert (plan.memories[0].image, plan.contents) == (False, {})
    assert plan.memories[0].reason == (
        "No plugin builds images; load memfd or anonymous (settings plugins and blocked)."
    )
    assert not plan.verdict.in_place


def test_memory_beside_one_without_an_image_gets_its_image() -> None:
    plan = plan_of(
        """(module (import "env" "base" (global i32)) (memory 1) (memory 2)
             (data (memory 1) (i32.const 70000) "of 1") (data (memory 0) (global.get 0) "dynamic")
             (data (memory 1) (i32.const 70001) "later"))"""
    )
    assert [memory.image for memory in plan.memories] == [False, True]
    assert list(plan.contents) == [1]
    assert [(s.offset, s.data) for s in plan.contents[1].segments] == [
        (70000, b"of 1"),
        (70001, b"later"),
    ]
    assert [bytes(s.data) for s in wasm.parse(plan.module).data_segments] == [b"dynamic"]


TWO = "The module has 2 memories and this host can be given a single one"
NATIVE = [
    ("(memory 1 2 shared)", "Memory 0 is shared between threads", (False, True)),
    ("(memory i64 1)", "Memory 0 has 64-bit addresses and no maximum", (False, True)),
    (
        "(memory i64 1 65537)",
        "Memory 0 may grow to 4295032832 bytes and a slot holds at most 4294967296",
        (False, True),
    ),
    (
        "(memory 1) (memory 7 (pagesize 1))",
        "Memory 1 has pages of 1 bytes and a slot grows by 65536",
        (False,),
    ),
    ("(memory 1) (memory 1)", TWO, (True,)),
    ('(import "a" "b" (memory 1)) (memory 1)', TWO, (True,)),
]


@pytest.mark.parametrize(
    ("text", "reason", "import_memory"),
    [(text, reason, mode) for text, reason, modes in NATIVE for mode in modes],
)
def test_module_that_no_slot_can_serve_runs_natively_with_the_reason(
    text: str, reason: str, *, import_memory: bool
) -> None:
    plan = plan_of(f"(module {text})", import_memory=import_memory)
    assert plan.module is plan.source
    assert plan.import_name is None
    assert plan.native is not None
    assert plan.native.startswith(reason)
    assert plan.native.endswith(".")
    assert {memory.reason for memory in plan.memories} == {plan.native}
    assert ({memory.image for memory in plan.memories}, plan.contents) == ({False}, {})


def test_64_bit_memory_of_at_most_4_gib_gets_an_image() -> None:
    plan = plan_of("""(module (memory i64 1 65536) (data (i64.const 7) "x"))""")
    assert plan.memories[0].image
    assert plan.memories[0].maximum_bytes == 1 << 32
    assert plan.memories[0].memory64


def test_offset_of_the_wrong_type_is_left_for_the_runtime_to_refuse() -> None:
    source = bytes(wasmtime.wat2wasm("""(module (memory 1) (data (i32.const 7) "x"))"""))
    source = source.replace(b"\x41\x07\x0b\x01x", b"\x42\x07\x0b\x01x")
    plan = plan_of(source)
    assert plan.memories[0].reason == (
        "The offset of data segment 0 is an i64 and the memory's addresses are i32, so the runtime"
        " refuses the module."
    )


def test_module_that_is_not_understood_runs_natively_with_the_reason() -> None:
    source = b"\0asm\x01\0\0\0\x0e\x01\x00"
    plan = plan_of(source, import_memory=True)
    assert plan.native == (
        "The module has a section of the unknown kind 14; the runtime decides about it."
    )
    assert plan.module is source
    assert (plan.memories, plan.structure) == ((), None)
    assert report_on(plan).memories == ()
    assert plan.verdict.reasons == (plan.native,)
    assert (plan.verdict.in_place, plan.code, plan.saved_globals) == (False, None, ())


def test_import_of_the_memory_gets_a_module_name_that_the_guest_does_not_use() -> None:
    plan = plan_of(
        """(module (import "memslot" "f" (func)) (import "memslot1" "f" (func)) (memory 1))""",
        import_memory=True,
    )
    assert str(plan.import_name) == "memslot2.memory"
    assert wasm.parse(plan.module).imports[-1].name == plan.import_name


def test_report_of_a_plan_is_json_with_every_change() -> None:
    plan = plan_of(
        """(module (memory (export "m") 1) (data (i32.const 8) "abc") (data "p"))""",
        import_memory=True,
    )
    report = json.loads(json.dumps(dataclasses.asdict(report_on(plan))))
    assert report["changes"] == [
        "1 data segment of memory 0 (3 bytes) went from the module into its image.",
        "Memory 0 is imported as memslot.memory instead of defined.",
    ]
    assert report["import_name"] == "memslot.memory"
    assert report["memories"][0]["image"] is True
    assert report["memories"][0]["exported_as"] == ["m"]


def _memory(*, pages: int = 1, count: int = 1) -> bytes:
    return section(5, vector(*[b"\0" + unsigned(pages)] * count))


def _scattered(count: int) -> bytes:
    """Return sections of one memory with a byte in each 200th page of the host."""
    offsets = (200 * P * n for n in range(count))
    data = (b"\0\x41" + signed(at) + END + unsigned(1) + b"x" for at in offsets)
    return _memory(pages=65536) + section(11, vector(*data))


MANY: dict[str, Callable[[int], bytes]] = {
    "exports of reserved names": lambda n: (
        _memory() + section(7, vector(*(name(f"memslot{k or ''}:") + b"\2\0" for k in range(n))))
    ),
    "imports of reserved modules": lambda n: section(
        2, vector(*(name(f"memslot{k or ''}") + name("m") + b"\2\0\1" for k in range(n)))
    ),
    "imported memories and passive segments": lambda n: (
        section(2, vector(*[name("") + name("") + b"\2\0\0"] * n))
        + section(11, vector(*[b"\1" + unsigned(1) + b"x"] * n))
    ),
    "memories": lambda n: _memory(count=n),
    "scattered segments": _scattered,
    "segments of imported memories": lambda n: (
        section(2, vector(*[name("") + name("") + b"\2\0\1"] * n))
        + section(
            11,
            vector(*(b"\2" + unsigned(k) + b"\x41\0\x0b" + unsigned(1) + b"x" for k in range(n))),
        )
    ),
    "exported globals": lambda n: (
        section(6, vector(*[b"\x7f\1\x41\0\x0b"] * n))
        + section(7, vector(*(name(f"{k}") + b"\3" + unsigned(k) for k in range(n))))
    ),
    "globals of globals": lambda n: section(
        6, vector(b"\x7f\0\x41\0\x0b", *(b"\x7f\0\x23" + unsigned(k) + END for k in range(n)))
    ),
    "exported tables": lambda n: (
        section(4, vector(*[b"\x70\0\1"] * n))
        + section(7, vector(*(name(f"{k}") + b"\1" + unsigned(k) for k in range(n))))
    ),
    "custom sections": lambda n: _memory() + custom("x") * n,
}


@pytest.mark.parametrize("import_memory", [False, True])
@pytest.mark.parametrize("many", MANY.values(), ids=MANY.keys())
def test_planning_takes_steps_linear_in_the_bytes_of_the_module(
    many: Callable[[int], bytes], *, import_memory: bool
) -> None:
    def steps(count: int) -> int:
        taken = 0

        def step(_frame: Any, event: str, _: Any) -> Any:
            nonlocal taken
            taken += event == "line"
            return step

        source = HEADER + many(count)
        before = sys.gettrace()
        sys.settrace(step)
        try:
            plan = plan_of(source, import_memory=import_memory)
            for content in plan.contents.values():
                images.extents_of(content)
            report_on(plan)
        finally:
            sys.settrace(before)
        return taken

    steps(1)  # work that is done once per process
    once, twice, four_times = map(steps, (100, 200, 400))
    assert four_times - twice <= 2.2 * (twice - once)


def test_data_that_is_scattered_makes_no_image_of_zeros() -> None:
    assert plan_of(HEADER + _scattered(16)).memories[0].image
    (memory,) = plan_of(HEADER + _scattered(40)).memories
    assert memory.reason == (
        f"Its data is so scattered that an image would hold {39 * 199 * P} bytes of zeros between it, and the"
        " limit is 16777216; put the data together to get an image."
    )
