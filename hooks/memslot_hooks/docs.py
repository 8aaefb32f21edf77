"""Prints the page about hooks from the specifications, so that the two cannot disagree."""

from __future__ import annotations

import inspect

from memslot_hooks.specs import DECIDING, LIFECYCLE, WATCHING, MemslotSpecs
from memslot_hooks.specs import __doc__ as _specs_doc

_INTRODUCTION = """\
# Hooks

<!-- Printed by docs/generate.py from hooks/memslot_hooks/; edit the specifications, not this page. -->

A host asks plugins for every linear memory: to create it, grow it, reset it and take it back.
memslot's own allocators, `memfd` and `anonymous`, are two such plugins and have no privileges.
Everything a plugin imports is in `memslot_hooks`, which needs pluggy alone.

A plugin is a module, an object, or a class that is instantiated once per host without arguments.
Its functions bear the name of a hook and the `hookimpl` marker, and leave out the arguments that
they do not need. Sizes are bytes and addresses integers throughout.

## Three kinds of hooks

**Lifecycle** hooks are called on every plugin, outside of the hot path: a host opens or closes, an
image goes away, `memslot doctor` asks.

**Deciding** hooks are asked in turn until one plugin answers something other than None, which means
"not mine". Plugins are asked in this order: `@hookimpl(tryfirst=True)` before all others, then
what the embedder registered (the last one first), then installed plugins by name, then memslot's
`memfd`, and `trylast` ones such as memslot's `anonymous`, which accepts everything. So a plugin
that wants to *limit* but not to *own* memories is `tryfirst` and answers False or None. An answer
of a type that the hook does not allow is a `PluginError` that names plugin and hook, and so is the
silence of all plugins, with two exceptions: nobody's growth is a refused growth, and nobody's image
means that the guest has none.

**Watching** hooks tell everybody what has happened. What they return is ignored. What they raise is
logged by the logger `memslot.plugins` (once per plugin and hook, then counted) and never reaches
the guest's caller. They are fired by hosts, in the middle of a request: be quick.

`@hookimpl(wrapper=True)` works on each of them, as pluggy describes it.

## Enabling a plugin

By *entry point*, for a plugin that is a distribution of its own. Every host of a process that starts
after the installation loads it:

```toml
[project.entry-points.memslot]
tenant-limits = "tenant_limits:TenantLimits"
```

By *registration*, for a plugin that is part of the embedding program. It may happen at any time;
a plugin that comes late hears at once which hosts are open:

```python
plugins = Plugins()
plugins.register(MyPlugin(), name="mine")
plugins.unregister("mine")
```

`examples/tenant_limits/` is a complete plugin with its own pyproject.toml.

## Limiting and blocking

`MEMSLOT_PLUGINS=memfd,tenant-limits` (setting `plugins`) loads only the installed plugins that it
names; a name that is not installed is a `SettingError` that lists those which are. What
`MEMSLOT_BLOCKED` (setting `blocked`) names is never imported nor asked, whether it comes by entry
point or by registration.

An installed plugin that raises while it is imported or instantiated is logged and skipped, and
`memslot plugins` prints the reason. These mistakes are a `PluginError` instead, when the plugin is
registered: a misspelt hook (the error names the nearest real one), an argument that the hook does
not have, an argument with a default (pluggy may pass the default instead of the value), a missing
marker, two plugins of one name.

## Arming, and what a call costs

A call through pluggy collects arguments by name, and does so also when nobody implements the hook.
That is too much next to a reset of a few microseconds. So a host calls through `plugins.armed`,
whose attributes are made anew whenever a plugin is registered or unregistered:

- a watching hook is None while nobody implements it; the host compares and goes on;
- a deciding hook calls its implementations directly, in pluggy's order, and checks the answer;
- an implementation that takes all arguments in the order of the specification is called as it is,
  another one through a small adapter;
- only where a plugin *wraps* a hook, pluggy's own caller is used, at pluggy's price.

Measured with CPython 3.10 and 3.11 on one machine: a deciding hook with one implementation costs
about a tenth of pluggy's price, and a watching hook without a watcher a thirtieth or less.
Keep the `armed` object, not its attributes: an attribute that was kept goes on asking the plugins of
yesterday. pluggy's tracing and monitoring do not see armed calls.
"""

_KINDS = (
    ("Lifecycle hooks", LIFECYCLE),
    ("Deciding hooks", DECIDING),
    ("Watching hooks", WATCHING),
)


def hooks_page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRODUCTION]
    examples = inspect.cleandoc(_specs_doc or "").partition("The examples share these lines:")
    parts.append(f"## What the examples share\n\n{_fence_examples(examples[2].strip())}\n")
    for title, hooks in _KINDS:
        parts.append(f"## {title}\n")
        parts += [_section(hook) for hook in hooks]
    return "\n".join(parts)


def _section(hook: str) -> str:
    specification = getattr(MemslotSpecs, hook)
    signature = inspect.signature(specification)
    arguments = ", ".join(
        f"{argument.name}: {argument.annotation}"
        for argument in list(signature.parameters.values())[1:]
    )
    text = inspect.getdoc(specification) or ""
    return (
        f"### {hook}\n\n```python\ndef {hook}({arguments}) -> {signature.return_annotation}\n```\n\n"
        f"{_fence_examples(text)}\n"
    )


def _fence_examples(text: str) -> str:
    """Put each block of interactive Python between fences; everything else is Markdown already."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        f"```python\n{block}\n```" if block.startswith(">>> ") else block for block in blocks
    )
