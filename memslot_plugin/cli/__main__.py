"""`python -m memslot_plugin.cli`."""

from memslot_plugin.cli import main

main(prog_name="memslot")
