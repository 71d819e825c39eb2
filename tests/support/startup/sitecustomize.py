"""What every Python process of the tests starts with: PYTHONPATH has this folder.

Fewer garbage collections: they take a sixth of an import of torch, transformers and DeepSpeed, and later a full one
takes 0.2 s. No SciPy: transformers imports it where it is installed (0.4 s), and only datasketch of the dev extra and
lm-evaluation-harness bring it. tests/conftest.py gives it back to the tests' own process.
"""

import gc
import importlib.util
import sys

gc.set_threshold(200_000, 20, 100)  # default: 700, 10, 10
if importlib.util.find_spec("lm_eval") is None:
    sys.modules["scipy"] = None
