"""A checkpoint that one process publishes, as the ranks of a training do together."""

from ropeway.runtime.manifest import describe_files, iterate_files
from ropeway.stages.train import checkpoints


def commit(root, step, log, facts):
    """Publish the partial folder of `step` with this log and these facts; return the checkpoint's folder."""
    checkpoints.write_log(root, step, log)
    partial = checkpoints.partial_folder(root, step)
    names = [path.relative_to(partial).as_posix() for path in iterate_files(partial)]
    folder = checkpoints.publish(root, step, facts, describe_files(partial, names, sync=True))
    checkpoints.mark_verified(folder)
    return folder
