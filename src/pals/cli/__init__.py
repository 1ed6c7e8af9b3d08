"""The `pals` command: wires all folders; the only part that knows every other."""

from pals.cli.main import main

__all__ = ["main"]
