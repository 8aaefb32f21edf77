"""First steps: a guest, an instance in a slot, a call, and a reset.

python examples/first_steps.py
"""

import memslot_plugin as memslot

COUNTER = """
(module
  (memory (export "memory") 1)
  (data (i32.const 0) "\\29\\00\\00\\00")                       ;; 41, in the image
  (func (export "next") (result i32)
    (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
    (i32.load (i32.const 0))))
"""


def main() -> None:
    with memslot.open_host() as host:  # on wasmtime or wasmer, or the host that MEMSLOT_HOST names
        guest = host.prepare(COUNTER, name="counter")  # once: compiled, and its data in an image
        with guest.instantiate() as instance:  # leases a slot
            print("next:", instance.call("next"), instance.call("next"))
            print("its first bytes:", instance.memory.read(0, 4).hex(" "))
            instance.reset()  # same handle; all writes are undone
            print("next after a reset:", instance.call("next"))
        with guest.instantiate() as instance:  # the same slot again: no mapping call at all
            print("next in another instance:", instance.call("next"))

        (pool,) = [pool for pool in host.statistics().pools if pool.leases]
        print(f"{host.name}: {pool.leases} leases of {pool.created} slot, memory by {pool.plugin}")


if __name__ == "__main__":
    main()
