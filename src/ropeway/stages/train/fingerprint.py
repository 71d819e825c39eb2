"""What determines a training run's result, as one hash: another run is another checkpoint folder."""

from dataclasses import dataclass
from typing import Any

from ropeway.config.frozen import FrozenInputs
from ropeway.config.params import Profile
from ropeway.config.stages import READS
from ropeway.data.shards import REMEDY
from ropeway.runtime.manifest import digest_of, load_manifest
from ropeway.runtime.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The hash and its parts; ranks, cadence and tracking are not among them.

    Attributes:
        digest: 16 hex digits, the name of the run's checkpoint folder.
        parts: Digests of params, data, base, DeepSpeed JSON and code.
        params: The parameters themselves.
    """

    digest: str
    parts: dict[str, str]
    params: dict[str, Any]


def take_fingerprint(workspace: Workspace, profile: Profile, frozen: FrozenInputs) -> Fingerprint:
    """Return the fingerprint of the run that this workspace would train now.

    Args:
        workspace: Where base and data are.
        profile: As train reads it.
        frozen: Holds the digests of the DeepSpeed JSON and of train's code.

    Raises:
        DataError: Base or data are unfinished or changed after they were written.
    """
    base = load_manifest(workspace.base, remedy="Run `dvc checkout`, or `dvc repro base`")
    data = load_manifest(workspace.data, remedy=REMEDY)
    dumped = profile.model_dump(mode="json", include=set(READS["train"]))
    parts = {
        "params": digest_of(dumped),
        "base": digest_of(base),
        "data": digest_of(data),
        "deepspeed": frozen.digest("deepspeed"),
        "code": frozen.digest("code-train"),
    }
    return Fingerprint(digest_of(parts)[:16], parts, dumped)
