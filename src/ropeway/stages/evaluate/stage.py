"""Stage evaluate. Scores the exported folder and its base as any user would open them; writes figures and tables.

Nothing here goes through ropeway.stages.train.stage: what is measured is what is shipped.

eval.json                  loss, perplexity, accuracy, nats a byte per source and model; positions, passkeys and
                           tasks of lm-evaluation-harness in short
samples.json               answers to prompts, base beside tuned, in the published family's JSON
tables/*.csv               scores, positions, passkey (share by length), passkey_answers (every answer, wrong ones too)
"""

from ropeway.config.params import Profile
from ropeway.runtime.workspace import Workspace


def check_request(workspace: Workspace, profile: Profile) -> None:
    """Raise now, before anything is trained, what would end this stage whatever the trained model is.

    Raises:
        ConfigError, DataError, TemporaryError: As `run`, but for what concerns the trained model.
    """
    from ropeway.stages.evaluate.evaluation import check_request as check

    check(workspace, profile)


def run(workspace: Workspace, profile: Profile) -> None:
    """Write the files of the run in this workspace.

    Raises:
        DataError: Data, base and model do not belong together, a source has nothing to measure, or a loss is not
            finite.
        ConfigError: A file or task that `evaluation` names is missing or not of its form, or a passkey length is too
            short.
        TemporaryError: A task's data could not be fetched, or one of several processes that measure was killed; then
            nothing was written.
    """
    from ropeway.stages.evaluate.evaluation import write_report

    write_report(workspace, profile)
