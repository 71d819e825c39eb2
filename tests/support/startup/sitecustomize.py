"""Fewer garbage collections, from the start of every Python process of the tests: PYTHONPATH has this folder.

Collections take a sixth of an import of torch, transformers and DeepSpeed, and later a full one takes 0.2 s.
"""

import gc

gc.set_threshold(200_000, 20, 100)  # default: 700, 10, 10
