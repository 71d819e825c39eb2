"""Shared by all processes: errors, workspace paths, manifests, locks, supervision, devices."""
