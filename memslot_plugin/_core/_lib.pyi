# The compiled cffi module. memslot.h and wasmtime_bridge.h describe its contents; no type checker reads them.
from typing import Any

ffi: Any
lib: Any
