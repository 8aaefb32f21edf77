"""A generator of valid modules: the same module for the same seed.

    world  <-  declarations  <-  segments  <-  module  ->  body  ->  values

`emit` writes the binary format, `opcodes` lists what values are made of, `probes` are functions that tell the state.
"""

from __future__ import annotations

from .module import Generated
from .world import FEATURES, Features, Import

generate = Generated

__all__ = ["FEATURES", "Features", "Import", "generate"]
