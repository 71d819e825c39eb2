"""Stage train: DeepSpeed ranks, checkpoints, the exported model."""
