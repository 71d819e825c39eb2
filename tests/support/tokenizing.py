"""Data as tokenize and prepare make it, one after the other."""

from ropeway.config.stages import READS
from ropeway.config.tokenize_params import TokenizeParams
from ropeway.stages.prepare import stage as prepare
from ropeway.stages.tokenize import stage as tokenize

KEYS = tuple(dict.fromkeys([*READS["tokenize"], *READS["prepare"]]))  # what the two read of a profile


def tokenize_and_prepare(workspace, profile):
    """Run both, each with no more of the profile than it reads."""
    run_tokenize(workspace, profile)
    prepare.run(workspace, profile.reading(READS["prepare"]))


def run_tokenize(workspace, profile):
    """Run the first."""
    tokenize.run(workspace, TokenizeParams.of(profile))
