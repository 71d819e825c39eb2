"""Rehearsal of a run without a GPU: the real DeepSpeed engine on tensors without memory, every storage counted.

`compare.rehearse` starts one process per rank (`python -m ropeway.engine_rehearsal`). What is replaced, and why:
docs/decisions.
"""
