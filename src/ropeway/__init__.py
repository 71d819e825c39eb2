"""Ropeway retrains a long-context chat Llama on a schedule: fetch, base, prepare, train, evaluate, package."""

__version__ = "0.1.0"
