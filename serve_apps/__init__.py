"""Serve applications, one module each, and the console that shows them."""

from pathlib import Path

CONSOLE = Path(__file__).parent / "console"
