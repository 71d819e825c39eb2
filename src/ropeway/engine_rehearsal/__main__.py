"""One rank of a rehearsal as a process: reads cases as JSON from stdin, prints their peaks as JSON on stdout."""

import json
import logging
import os
import sys
import warnings

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported; `install` replaces it by the fake card

import deepspeed
import transformers

from ropeway.config.params import Profile
from ropeway.engine_rehearsal.engine import Case, join_group, rehearse_rank
from ropeway.runtime.errors import RopewayError


def main() -> None:
    """Rehearse every case of the request as one rank."""
    warnings.simplefilter("ignore")  # torch warns about every address of a fake tensor that DeepSpeed reads
    transformers.logging.set_verbosity_error()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    request = json.load(sys.stdin)
    join_group(request["rank"], request["ranks"])
    cases = [Case(Profile.model_validate_json(one["profile"]), one["deepspeed"]) for one in request["cases"]]
    print(json.dumps([rehearse_rank(case, ranks=request["ranks"]) for case in cases]))


if __name__ == "__main__":
    try:
        main()
    except RopewayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
