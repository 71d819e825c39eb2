"""Prefect flows: when, where, and what if it fails. Nothing in this folder computes anything."""
