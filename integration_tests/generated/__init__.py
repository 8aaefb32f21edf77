"""A generator of valid modules. A seed always makes the same module.

    world  <-  declarations  <-  segments  <-  module  ->  body  ->  values

`emit` writes the binary format, `opcodes` lists instructions for values, `probes` are functions that read the state.
"""

from __future__ import annotations

from .module import Generated
from .world import FEATURES, Features, Import

generate = Generated

__all__ = ["FEATURES", "Features", "Import", "generate"]
