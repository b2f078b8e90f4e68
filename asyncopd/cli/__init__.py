"""The `asyncopd` command."""

from asyncopd.cli.app import main

__all__ = ["main"]
