"""Realtime auction timer: command line, local stack and client."""

__version__ = "0.1.0"
