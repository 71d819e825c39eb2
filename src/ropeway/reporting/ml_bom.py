"""The bill of materials of a version in CycloneDX 1.6 (ML-BOM): model, data, base and libraries, with their digests.

It has no time and no host, so equal packages made by equal libraries give equal bytes. What was not recorded, such as
the license of a source, is stated as such. Source of the format: ECMA-424, https://cyclonedx.org/docs/1.6/json/.
"""

import uuid
from collections.abc import Iterator, Mapping

from ropeway.data.lineage import describe_base, describe_source
from ropeway.runtime.manifest import Json

FORMAT = "1.6"
LIBRARIES = ("torch", "transformers", "deepspeed")  # provenance.json has their versions
_NAMESPACE = uuid.UUID("6f1c2a52-7c0e-4d3a-9d0b-3f5c6f1f7a10")  # of serial numbers, drawn once
_MODEL = "model"
_UNKNOWN = "not recorded"


def build_ml_bom(
    manifest: Json, card: Json, config: Json, evaluation: Json, provenance: Json, *, version: str
) -> dict[str, object]:
    """Return the bill of materials of a version.

    Args:
        manifest: manifest.json of the version.
        card: Its card.json.
        config: Its config.json, which names the architecture.
        evaluation: Its eval.json.
        provenance: provenance.json of the training; its last attempt names the libraries.
        version: The installed version of Ropeway.
    """
    datasets = list(_list_datasets(card))
    base = _describe_base(card, manifest["digests"]["base"])
    libraries = list(_list_libraries(provenance))
    learns_answers = any(source["kind"] == "conversation" for source in card["sources"])
    model = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": card["name"],
        "version": str(card["fingerprint"]),
        "licenses": [_license(card["params"]["card"]["license"], card["params"]["card"]["license_link"])],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised" if learns_answers else "self-supervised"},
                "task": "text generation",
                "architectureFamily": "transformer decoder",
                "modelArchitecture": ", ".join(config.get("architectures") or [_UNKNOWN]),
                "datasets": [{"ref": one["bom-ref"]} for one in datasets],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": _list_metrics(evaluation)},
        },
        "components": [
            {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [_sha256(facts["sha256"])]}
            for path, facts in sorted(manifest["files"].items())
        ],
        "properties": [
            _property("ropeway:parameters", card["parameters"]),
            _property("ropeway:steps", card["applied_steps"]),
        ],
    }
    parts = [*datasets, base, *libraries]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{FORMAT}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": FORMAT,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, str(sorted(manifest['files'].items())))}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "ropeway", "version": version}]},
            "component": model,
        },
        "components": parts,
        "dependencies": [{"ref": _MODEL, "dependsOn": [str(part["bom-ref"]) for part in parts]}],
    }


def _list_datasets(card: Json) -> Iterator[dict[str, object]]:
    licenses = card["params"]["card"].get("dataset_licenses", {})
    for source in card["sources"]:
        name, identity = source["name"], source["identity"]
        files = identity.get("files")
        listed = files.items() if isinstance(files, Mapping) else ()  # of the Hub: names, which the commit pins
        digests = {path: digest for path, digest in listed if isinstance(digest, str)}
        contents = [
            {"type": "dataset", "name": origin.name, **({"contents": {"url": origin.link}} if origin.link else {})}
            for origin in describe_source(identity)
        ]
        yield {
            "type": "data",
            "bom-ref": f"data:{name}",
            "name": name,
            "version": str(identity.get("commit") or identity.get("python") or _UNKNOWN),
            **({"licenses": [_license(licenses[name])]} if name in licenses else {}),
            "data": contents,
            "properties": [
                _property("ropeway:kind", source["kind"]),
                *([] if name in licenses else [_property("ropeway:license", _UNKNOWN)]),
                *(_property(f"ropeway:sha256:{path}", digest) for path, digest in sorted(digests.items())),
            ],
        }


def _describe_base(card: Json, digest: str) -> dict[str, object]:
    origin = describe_base(card["base"])
    return {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": origin.name,
        "version": origin.pin.removeprefix("version ") or _UNKNOWN,
        "properties": [_property("ropeway:sha256", digest), _property("ropeway:license", _UNKNOWN)],
        **({"externalReferences": [{"type": "distribution", "url": origin.link}]} if origin.link else {}),
    }


def _list_libraries(provenance: Json) -> Iterator[dict[str, object]]:
    attempts = provenance.get("attempts") or [{}]
    last = attempts[-1] if isinstance(attempts[-1], Mapping) else {}
    if python := last.get("python"):
        yield {"type": "platform", "bom-ref": "python", "name": "python", "version": str(python)}
    for name in LIBRARIES:
        if found := last.get(name):
            number = str(found)
            purl = f"pkg:pypi/{name}@{number.replace('+', '%2B')}"
            yield {"type": "library", "bom-ref": name, "name": name, "version": number, "purl": purl}


def _list_metrics(evaluation: Json) -> list[dict[str, str]]:
    """Return the losses of the tuned model in nats/token, over all sources and of each."""
    sources = evaluation["sources"]
    losses = {"mean": evaluation["mean"]["tuned"], **{name: one["tuned"]["loss"] for name, one in sources.items()}}
    return [{"type": "loss (nats/token)", "value": str(value), "slice": name} for name, value in losses.items()]


def _license(name: str, link: str | None = None) -> dict[str, object]:
    return {"license": {"name": name, **({"url": link} if link and link.startswith("http") else {})}}


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _property(name: str, value: object) -> dict[str, str]:
    return {"name": name, "value": str(value)}
