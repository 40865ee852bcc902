"""Measurements, and the command that repeats them: ``python -m bench`` (``make bench``)."""
