"""`python -m ropeway.runtime.op_build`: build the op DeepSpeed needs on a CPU, once, at set-up."""

import os
import sys

from ropeway.runtime.devices import list_gpus
from ropeway.runtime.errors import RopewayError


def main() -> None:
    """Load the op, which compiles it when it is not there yet; nothing to do on a machine with GPUs."""
    if list_gpus():
        return
    from ropeway.runtime.launcher import check_compiler
    from ropeway.runtime.op_leftovers import clear_dead_locks, extensions_folder

    check_compiler()
    os.environ["DS_ACCELERATOR"] = "cpu"
    folder = extensions_folder(os.environ)
    clear_dead_locks(folder)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


if __name__ == "__main__":
    try:
        main()
    except RopewayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
