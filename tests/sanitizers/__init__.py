"""Runs of native code that notice what it may not do: see `python -m tests.sanitizers --help`."""
