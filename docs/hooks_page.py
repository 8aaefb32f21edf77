"""Print docs/hooks.md from the hook specifications, so that the two cannot disagree."""

from __future__ import annotations

import inspect

from memslot_hooks.specs import DECIDING, LIFECYCLE, WATCHING, MemslotSpecs
from memslot_hooks.specs import __doc__ as _specs_doc

_INTRODUCTION = """\
# Hooks

<!-- Printed by docs/generate.py from hooks/memslot_hooks/; edit the specifications, not this page. -->

A host asks plugins for every linear memory: to create it, grow it, reset it and release it.
memslot's own allocators, `memfd` and `anonymous`, and its hosts, `wasmtime`, `wasmer` and `fake`, are
plugins too and use the same hooks. A plugin imports `memslot_hooks`, which needs pluggy alone.

A plugin is a module, an object, or a class that is instantiated once per host without arguments.
Its functions have the name of a hook and the `hookimpl` marker, and leave out the arguments that
they do not need. Sizes are bytes and addresses are integers throughout.

## Three kinds of hooks

**Lifecycle** hooks are called on every plugin, outside of the hot path: a host opens or closes, an
image goes away, `memslot doctor` asks.

**Deciding** hooks are asked in turn until a plugin answers something other than None, which means
"not mine". The order is: `@hookimpl(tryfirst=True)` before all others, then the embedder's plugins
(the last one registered first), then installed plugins by name, then memslot's `memfd`, then
`trylast` ones such as memslot's `anonymous`, which accepts every request. So a plugin that *limits*
memories without *owning* them is `tryfirst` and answers False or None. An answer of a type that the
hook does not allow is a `PluginError` that names plugin and hook. If all plugins are silent, a growth
is refused, a guest gets no image, and no memory is warm; for other hooks silence is a `PluginError`.

**Watching** hooks notify every plugin of what has happened. Return values are ignored. Exceptions are
logged by the logger `memslot.plugins` (once per plugin and hook, then counted) and do not reach the
caller, except those of `memslot_instance_restored`. Hosts call these hooks in the middle of a request:
return quickly.

`@hookimpl(wrapper=True)` works on each hook, as pluggy describes it.

## Enabling a plugin

By *entry point*, for a plugin that is a distribution of its own. Every host of a process that starts
after the installation loads it:

```toml
[project.entry-points.memslot]
tenant-limits = "tenant_limits:TenantLimits"
```

By *registration*, for a plugin that is part of the embedding program. `open_host` takes such plugins
by the argument `plugins`, and a host registers one at any time:

```python
host = memslot.open_host("wasmtime", plugins=[MyPlugin()])
host.plugins.register(Another(), name="another")
host.plugins.unregister("another")
```

`examples/tenant_limits/` is a complete plugin with its own pyproject.toml.

## Limiting and blocking

`MEMSLOT_PLUGINS=memfd,tenant-limits` (setting `plugins`) loads only the installed plugins that it
names; a name that is not installed is a `SettingError` that lists those which are. memslot's own hosts
stay registered, because the setting chooses who serves memories. `MEMSLOT_BLOCKED` (setting `blocked`)
names plugins that are never imported nor asked, whether they come by entry point or by registration;
it blocks memslot's hosts too.

An installed plugin that raises while it is imported or instantiated is logged and skipped, and
`memslot plugins` prints the reason. These mistakes are a `PluginError` instead, when the plugin is
registered: a misspelt hook (the error names the nearest real one), an argument that the hook does
not have, an argument with a default (pluggy may pass the default instead of the value), a missing
marker, two plugins of one name.

## Arming, and the price of a call

A call through pluggy collects arguments by name, also when no plugin implements the hook. That is too
much next to a reset of a few microseconds. So a host calls through `plugins.armed`, whose attributes
are made anew whenever a plugin is registered or unregistered:

- a watching hook is None without an implementation; the host compares and goes on;
- a deciding hook calls its implementations directly, in pluggy's order, and checks the answer;
- an implementation that takes all arguments in the order of the specification is called as it is,
  another one through a small adapter;
- pluggy's own caller is used, at pluggy's price, only if a plugin *wraps* the hook.

With CPython 3.10 and 3.11 a deciding hook with one implementation costs about a tenth of pluggy's
price, and a watching hook without a watcher a thirtieth or less (`memslot bench` measures both).
Keep the `armed` object, not its attributes: a kept attribute goes on calling the plugins of its time.
pluggy's tracing and monitoring do not see armed calls.
"""

_KINDS = (
    ("Lifecycle hooks", LIFECYCLE),
    ("Deciding hooks", DECIDING),
    ("Watching hooks", WATCHING),
)


def hooks_page() -> str:
    """Return the whole page as Markdown."""
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
    """Put each block of interactive Python between fences; the rest is Markdown already."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        f"```python\n{block}\n```" if block.startswith(">>> ") else block for block in blocks
    )
