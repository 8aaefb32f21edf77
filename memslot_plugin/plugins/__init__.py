"""Plugins: `manager` loads and describes them, `validation` checks them, `arming` makes fast calls."""

from memslot_plugin.plugins.arming import Armed
from memslot_plugin.plugins.manager import PluginInfo, Plugins

__all__ = ["Armed", "PluginInfo", "Plugins"]
