"""Measurements; README.md has the command that repeats each."""
