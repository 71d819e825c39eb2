"""Ropeway retrains a long-context chat Llama: fetch, base, tokenize, prepare, train, evaluate, package."""

__version__ = "0.1.0"
