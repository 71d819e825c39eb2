"""Stages in Prefect work pools: what the calling run sends, what a worker does, how the result comes back."""
