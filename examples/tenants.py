"""Many tenants, few slots: growth is limited per tenant, and load is shed when every slot is in use.

    python examples/tenants.py

The plugin is an object of this program; examples/tenant_limits is one that is installed.
"""

from __future__ import annotations

import memslot_plugin as memslot
from memslot_hooks import LinearMemory, MemoryRequest, hookimpl

PAGE = 65536

NOTEBOOK = """
(module
  (memory (export "memory") 1 16)
  (func (export "write") (param $at i32) (param $byte i32) (i32.store8 (local.get $at) (local.get $byte)))
  (func (export "read") (param $at i32) (result i32) (i32.load8_u (local.get $at)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))
"""


class Tenants:
    """The limits of each tenant in bytes, as a plugin."""

    def __init__(self) -> None:
        self.limits = {"ann": 8 * PAGE, "bob": 2 * PAGE}

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        limit = self.limits[memory.request.tenant or ""]
        return (
            None if byte_size <= limit else False
        )  # None: the plugin that owns the memory decides

    @hookimpl
    def memslot_pool_exhausted(self, request: MemoryRequest, limit: int, in_use: int) -> None:
        print(f"{request.tenant} has to come back later: {in_use} of {limit} slots are in use")


def main() -> None:
    with memslot.open_host(slots=2, plugins=[Tenants()]) as host:
        guest = host.prepare(NOTEBOOK, name="notebook")

        with guest.instantiate(tenant="ann") as ann, guest.instantiate(tenant="bob") as bob:
            ann.call("write", 100, ord("a"))
            print("bob reads:", bob.call("read", 100))

            for name, instance in (("ann", ann), ("bob", bob)):
                pages = instance.call("grow", 3)  # the guest sees -1 where it is refused
                print(f"{name} asks for 3 more pages:", "refused" if pages == -1 else "granted")

            try:
                guest.instantiate(tenant="eve")
            except memslot.PoolExhausted as error:
                print(f"shed: {error.in_use} of {error.limit}")

        with guest.instantiate(
            tenant="eve"
        ) as eve:  # in a slot that another tenant wrote to before
            print("eve reads:", eve.call("read", 100), "of", eve.memory.byte_size // PAGE, "page")


if __name__ == "__main__":
    main()
