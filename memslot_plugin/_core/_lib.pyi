# The compiled cffi module. Its contents are described by cdef.h and callbacks.cdef, which no type checker reads.
from typing import Any

ffi: Any
lib: Any
