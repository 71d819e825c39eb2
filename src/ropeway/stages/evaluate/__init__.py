"""Stage evaluate: scores of the exported model and its base."""
