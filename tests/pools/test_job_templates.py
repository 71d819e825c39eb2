"""The job templates of deploy/, rendered by Prefect's own workers and validated by Kubernetes' own schemas."""

import asyncio
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from ropeway.runtime import environment
from ropeway.runtime.op_build import BUFFER_BYTES

pytest.importorskip("prefect_kubernetes", reason="`make test-pools` installs Prefect's workers")

import docker.types
import kubernetes_validate
from kubernetes_validate.utils import ValidationError
from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

pytestmark = pytest.mark.pools
DEPLOY = Path(__file__).parents[2] / "deploy"
CLUSTERS = ("1.30", "1.37")
# Prefect's worker demands these two of the pod, where Kubernetes ignores them; they belong to the job.
PREFECTS_OWN = ("parallelism", "completions")
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|AUTH_STRING|_KEY\b|ACCESS_KEY")


def template(kind):
    return json.loads((DEPLOY / f"{kind}-job-template.json").read_text())


class Blocks:
    """A Prefect server that knows every secret block."""

    async def read_block_document_by_name(self, name, block_type_slug, **_):
        assert block_type_slug == "secret"
        return SimpleNamespace(data={"value": f"value of {name}"}, block_type=SimpleNamespace(slug="secret"))


def render(kind, model, **values):
    """Return the configuration that a worker makes of the template."""
    values = {"name": "retrain", "command": "prefect flow-run execute", "labels": {}, **values}
    return asyncio.run(model.from_template_and_values.__wrapped__(model, template(kind), values, client=Blocks()))


def manifest(**values):
    job = render("kubernetes", KubernetesWorkerJobConfiguration, **values)
    job._populate_env_in_manifest()
    job._slugify_labels()
    job._populate_image_if_not_present()
    job._populate_command_if_not_present()
    job._populate_generate_name_if_not_present()
    rendered = json.loads(json.dumps(job.job_manifest))
    rendered["spec"]["template"]["spec"]["containers"][0]["args"] = ["prefect", "flow-run", "execute"]
    return rendered


def pod(rendered):
    return rendered["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", CLUSTERS)
@pytest.mark.parametrize("values", [{}, {"gpus": 0, "env": {"ROPEWAY_RANKS": "2"}, "backoff_limit": 2}])
def test_the_kubernetes_job_fits_the_published_schema_strictly(version, values):
    rendered = manifest(**values)
    for name in PREFECTS_OWN:
        assert pod(rendered).pop(name) == 1
    kubernetes_validate.validate(rendered, version, strict=True)
    pod(rendered)["terminationGraceSeconds"] = 1
    with pytest.raises(ValidationError):
        kubernetes_validate.validate(rendered, version, strict=True)


@pytest.mark.parametrize("version", CLUSTERS)
def test_the_volume_claim_fits_the_published_schema_and_the_template(version):
    claim = YAML(typ="safe", pure=True).load((DEPLOY / "kubernetes-workspace.yaml").read_text())
    kubernetes_validate.validate(claim, version, strict=True)
    assert pod(manifest())["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@pytest.mark.parametrize(("kind", "worker"), [("kubernetes", KubernetesWorker), ("docker", DockerWorker)])
def test_every_variable_is_used_and_every_setting_is_one_of_the_worker(kind, worker):
    found, default = template(kind), worker.get_default_base_job_template()
    assert found["job_configuration"].keys() <= default["job_configuration"].keys()
    text = json.dumps(found["job_configuration"])
    used = set(re.findall(r"\{\{ ([a-z_]+) \}\}", text))
    stated = set(found["variables"]["properties"])
    assert used <= stated
    assert stated - used <= {"env"}  # Prefect merges it into that of the configuration


def test_a_pod_has_time_to_save_and_kubernetes_does_not_restart_it():
    rendered = manifest()
    container = pod(rendered)["containers"][0]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert int(variables["ROPEWAY_GRACE_SECONDS"]) + 30 < pod(rendered)["terminationGracePeriodSeconds"]
    assert rendered["spec"]["backoffLimit"] == 0
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod(rendered)["securityContext"]["runAsNonRoot"] is True
    shared = pod(rendered)["volumes"][1]["emptyDir"]
    assert shared["medium"] == "Memory"
    assert to_bytes(shared["sizeLimit"]) > 2 * BUFFER_BYTES
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/workspace", "/dev/shm"}  # noqa: S108


def to_bytes(text):
    number, unit = re.fullmatch(r"(\d+)(Gi|g)", text).groups()
    return int(number) * 2**30 * bool(unit)


def test_a_container_of_a_docker_worker_is_created_with_these_options():
    job = render("docker", DockerWorkerJobConfiguration)
    options = job.container_create_kwargs
    requests = options["device_requests"]
    host = docker.types.HostConfig(
        version="1.44", init=options["init"], shm_size=options["shm_size"], device_requests=requests, binds=job.volumes
    )
    assert host["ShmSize"] > 2 * BUFFER_BYTES
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert host["Binds"] == ["/srv/ropeway:/workspace"]
    assert int(job.env["ROPEWAY_GRACE_SECONDS"]) < 30
    assert job.env["AWS_ACCESS_KEY_ID"] == "value of ropeway-aws-access-key-id"
    assert render("docker", DockerWorkerJobConfiguration, gpus=[]).container_create_kwargs["device_requests"] == []


@pytest.mark.parametrize("kind", ["kubernetes", "docker"])
def test_no_template_contains_a_secret_and_its_variables_are_known(kind):
    found = template(kind)
    variables = dict(found["variables"]["properties"]["env"]["default"])
    if isinstance(found["job_configuration"]["env"], dict):
        variables |= found["job_configuration"]["env"]
    secrets = {name: value for name, value in variables.items() if SECRET.search(name)}
    assert all(value.startswith("{{ prefect.blocks.secret.") for value in secrets.values())
    known = {one.name for group in environment.VARIABLES.values() for one in group}
    assert variables.keys() <= known
    if kind == "kubernetes":
        (source,) = found["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]["envFrom"]
        assert source == {"secretRef": {"name": "{{ secret_name }}"}}
