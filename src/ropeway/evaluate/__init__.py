"""Room: evaluate. Scores the exported folder and its base as any user would open them; leaves eval.json, samples.json.

Nothing here goes through ropeway.train: what is measured is what is shipped.
"""

from ropeway.params import Profile
from ropeway.workspace import Workspace


def run(workspace: Workspace, profile: Profile) -> None:
    """Write `eval.json` and `samples.json` of the run in this workspace.

    Raises:
        DataError: Data, base and model do not belong together, a source has nothing to measure, or a loss is not
            finite.
        ConfigError: The prompts file is missing or not lines of JSON strings.
    """
    from ropeway.evaluate.report import write_report

    write_report(workspace, profile)
