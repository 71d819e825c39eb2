"""Compares the data of a new version with that of earlier versions, for the gate and the evidence of its publication.

Three versions at most: the one before, the champion, and the oldest of a window. The last shows a slow shift, each step
of which is small. The number of requests does not depend on the number of versions. Under a signature policy, versions
of the window that it does not accept are named and not compared with.
"""

from collections.abc import Mapping
from pathlib import Path

from ropeway.config.sections import DriftLimits
from ropeway.data.data_profile import FILE, FORMAT, check_lists
from ropeway.data.drift import DriftEvidence, DriftReference, compare_profiles
from ropeway.registry import Artifact, Version
from ropeway.runtime.errors import DataError, NotFoundError, RegistryError
from ropeway.runtime.json_text import parse_json
from ropeway.runtime.manifest import Json

WINDOW = 5  # where gate.drift is null
_PREVIOUS = "the version before"
_REFUSED = "in the window"


def compare_with_earlier(
    artifact: Artifact,
    profile: Path,
    champion: Mapping[str, Version],
    limits: DriftLimits | None,
    *,
    own: str | None = None,
) -> DriftEvidence:
    """Return how the data of a new version differs from that of earlier ones; what cannot be compared is noted.

    Args:
        artifact: The model.
        profile: The new version's data_profile.json.
        champion: The version that the gate compares with, by its alias; empty for the first version.
        limits: Measures above them are flagged.
        own: Digest of the new version if it is registered already.
    """
    chosen = _choose_references(artifact, champion, limits.window if limits else WINDOW, own)
    try:
        new = parse_json(profile.read_bytes())
    except (OSError, ValueError) as error:
        return DriftEvidence(limits, note=f"{profile}: no data profile ({error})")
    if not chosen:
        return DriftEvidence(limits, note="there is no earlier version")
    return DriftEvidence(limits, tuple(compare_with(version, why, new, limits) for version, why in chosen))


def compare_with(version: Version, why: tuple[str, ...], new: Json, limits: DriftLimits | None) -> DriftReference:
    """Return the comparison with one earlier version; without a usable profile of it a note says so."""
    label = str(version)
    try:
        version.check_policy()
        return DriftReference(
            label, version.digest, why, tuple(compare_profiles(read_data_profile(version), new, limits))
        )
    except (ValueError, DataError, RegistryError) as error:
        return DriftReference(label, version.digest, why, note=str(error))


def read_data_profile(version: Version) -> Json:
    """Return the data profile of a version.

    Raises:
        NotFoundError: It has none: an older Ropeway published it.
        DataError: The stored file is no JSON, or a list of it has another length than its format states.
    """
    data = version.read_file(FILE)
    if data is None:
        raise NotFoundError(f"{version} has no {FILE}: it was published before versions recorded one")
    try:
        found = parse_json(data)
    except ValueError as error:
        raise DataError(f"{version}: {FILE} is not JSON ({error})") from None
    if not isinstance(found, dict):
        return {}
    if found.get("format") == FORMAT:
        try:
            check_lists(found)
        except ValueError as error:
            raise DataError(f"{version}: {FILE}: {error}. Another Ropeway, or none, wrote it") from None
    return found


def _choose_references(
    artifact: Artifact, champion: Mapping[str, Version], window: int, own: str | None
) -> list[tuple[Version, tuple[str, ...]]]:
    """Return the earlier versions to compare with, each with the reasons why."""
    earlier = artifact.latest(window + 1)
    if own in {version.digest for version in earlier}:
        earlier = earlier[[version.digest for version in earlier].index(own) + 1 :]
    earlier = earlier[:window]
    accepted = [version for version in earlier if _is_accepted(version)]
    reasons = [(accepted[0], _PREVIOUS)] if accepted else []
    reasons += [(version, alias) for alias, version in champion.items()]
    reasons += [(accepted[-1], f"oldest of the last {len(earlier)}")] if len(accepted) > 1 else []
    reasons += [(version, _REFUSED) for version in earlier if version not in accepted]
    found: dict[str, tuple[Version, tuple[str, ...]]] = {}
    for version, why in reasons:
        if version.digest != own:
            found[version.digest] = (version, (*found.get(version.digest, (version, ()))[1], why))
    return list(found.values())


def _is_accepted(version: Version) -> bool:
    try:
        version.check_policy()
    except DataError:
        return False
    return True
