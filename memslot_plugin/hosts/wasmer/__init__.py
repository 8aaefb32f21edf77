"""The host on wasmer-python 1.1.0; importing the package imports wasmer, and raises HostUnavailable if that fails."""

from memslot_plugin.errors import HostUnavailable

try:
    import wasmer  # noqa: F401
    import wasmer_compiler_cranelift  # noqa: F401
except ImportError as missing:
    raise HostUnavailable(
        f"wasmer cannot be imported ({missing}); wasmer-python 1.1.0 exists for CPython 3.7 to 3.10:"
        " install memslot[wasmer] there, or use the host wasmtime"
    ) from missing
