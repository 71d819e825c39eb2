"""What every Python process of the tests starts with: PYTHONPATH has this folder.

Fewer garbage collections: they take a sixth of an import of torch, transformers and DeepSpeed, and later a full one
takes 0.2 s. None at the end, where the interpreter's own take a fifth of a process's time: 0.9 s after an import of
DeepSpeed and transformers, 0.16 s of Prefect, 0.08 s of DVC.

No SciPy: transformers imports it where it is installed (0.4 s), and only datasketch of the dev extra and
lm-evaluation-harness bring it. tests/conftest.py gives it back to the tests' own process.
"""

import atexit
import gc
import importlib.util
import sys

gc.set_threshold(200_000, 20, 100)  # default: 700, 10, 10
atexit.register(gc.freeze)  # registered first, so called last
if importlib.util.find_spec("lm_eval") is None:
    sys.modules["scipy"] = None
