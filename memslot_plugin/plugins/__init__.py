"""Plugins: which are loaded, which are asked, in which order, and at which price.

`manager` finds, registers and describes them; `mistakes` reads their signatures before pluggy does;
`arming` makes the callables that hosts call in hot paths.
"""

from memslot_plugin.plugins.arming import Armed
from memslot_plugin.plugins.manager import PluginInfo, Plugins

__all__ = ["Armed", "PluginInfo", "Plugins"]
