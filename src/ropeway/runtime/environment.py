"""The environment variables that a run reads, in one table for the reference; each is read where it is used.

Environment is where, with which limits and as whom a run runs. What can change its result is in params.yaml.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ropeway.runtime.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EnvironmentVariable:
    """One variable: what it sets, and what applies when it is not set."""

    name: str
    meaning: str
    default: str = ""


_COUNT = re.compile("[0-9]{1,6}")
_SHOWN = 40  # characters of a value that is refused
_V = EnvironmentVariable
VARIABLES: dict[str, tuple[EnvironmentVariable, ...]] = {
    "Ranks and processes": (
        _V("ROPEWAY_RANKS", "Number of ranks that train.", "Slurm tasks, hostfile slots, GPUs here, else 2"),
        _V("ROPEWAY_HOSTFILE", "Hostfile with a line `HOST slots=N` per machine.", "this machine"),
        _V("ROPEWAY_LAUNCHER", "DeepSpeed launcher that reaches the machines of the hostfile.", "`pdsh`"),
        _V("ROPEWAY_SLURM", "`1` trains in a Slurm job that the run submits; ignored inside an allocation.", "0"),
        _V("ROPEWAY_SLURM_ARGS", "Options of sbatch for that job, e.g. `--nodes=2 --ntasks-per-node=8`."),
        _V("ROPEWAY_SLURM_POLL_SECONDS", "Seconds between two questions about that job to Slurm's controller.", "10"),
        _V("ROPEWAY_TOKENIZE_WORKERS", "Processes that tokenize.", "number of cores, fewer for little text"),
        _V("ROPEWAY_DASK_SCHEDULER", "Address of a Dask scheduler; its workers tokenize. Needs the extra `cluster`."),
        _V("ROPEWAY_EVALUATE_WORKERS", "Processes that evaluate.", "GPUs here, at most the ranks; 1 on a CPU"),
        _V("OMP_NUM_THREADS", "Threads per rank on a CPU. Another number rounds differently.", "cores / ranks here"),
        _V("CUDA_VISIBLE_DEVICES", "GPUs that a run may use.", "all"),
        _V("CXX", "C++ compiler that builds DeepSpeed's CPU op.", "`c++`"),
    ),
    "Training": (
        _V("ROPEWAY_KEEP_RUNS", "Runs of each profile that keep their checkpoints.", "3"),
        _V(
            "ROPEWAY_MEMORY_CHECK", "`off` starts training although the plan says that the GPUs cannot hold the states."
        ),
        _V("ROPEWAY_CHECKPOINT_STORE", "Store to which each checkpoint is uploaded: `s3://bucket/prefix`.", "none"),
        _V("ROPEWAY_SKIP_WARM_UP", "`1` skips the checkpoint of step 0 and the warm-up step."),
        _V("ROPEWAY_OTHER_VERSIONS", "`1` resumes from a checkpoint that another torch or DeepSpeed version wrote."),
        _V(
            "ROPEWAY_GRACE_SECONDS",
            "Seconds from TERM to KILL; a checkpoint must fit into them.",
            "what this attempt's steps and checkpoints need, at least 60",
        ),
        _V("ROPEWAY_RETRY_SECONDS", "Pause of the flow before it retries a stage, in seconds.", "5"),
    ),
    "Registry": (
        _V("ROPEWAY_REGISTRY", "Registry: `file:///path` or `s3://bucket/prefix`.", "`./registry`"),
        _V("ROPEWAY_CACHE", "Folder for versions that `chat` and `push-hub` pull.", "`$XDG_CACHE_HOME/ropeway`"),
        _V("XDG_CACHE_HOME", "Cache folder of the user.", "`~/.cache`"),
        _V("ROPEWAY_SIGNING_KEY", "File of the private key that signs what is published.", "not signed"),
        _V("ROPEWAY_SIGNING_CERTIFICATE", "Its certificate and the intermediate ones, if users trust an authority."),
        _V(
            "ROPEWAY_TRUSTED_KEYS",
            "Folder of `.pub`, `.crt` and `revoked.txt`. Versions that none of these keys signed are refused.",
            "all",
        ),
        _V("ROPEWAY_S3_TIMEOUT_SECONDS", "Timeout of a silent S3 connection, in seconds.", "60"),
        _V("AWS_PROFILE", "Section of the AWS configuration files."),
        _V("AWS_ACCESS_KEY_ID", "Key of the S3 account, with `AWS_SECRET_ACCESS_KEY`."),
        _V("AWS_SECRET_ACCESS_KEY", "Secret of that key."),
        _V("AWS_REGION", "Region of the bucket; `AWS_DEFAULT_REGION` is read too."),
        _V("AWS_DEFAULT_REGION", "Region, where `AWS_REGION` is not set."),
        _V("AWS_ENDPOINT_URL_S3", "S3 server; `AWS_ENDPOINT_URL` is read too.", "Amazon"),
        _V("AWS_ENDPOINT_URL", "Server of every AWS service, where `AWS_ENDPOINT_URL_S3` is not set."),
        _V("AWS_MAX_ATTEMPTS", "Attempts per request, with backoff.", "6"),
        _V("AWS_CA_BUNDLE", "Certificate of an S3 server of your own.", "the system's"),
        _V("AWS_REQUEST_CHECKSUM_CALCULATION", "`when_required` for servers without boto3's default checksums."),
        _V("AWS_RESPONSE_CHECKSUM_VALIDATION", "`when_required` for servers without boto3's default checksums."),
    ),
    "DVC": (_V("DVC_SITE_CACHE_DIR", "Folder of DVC's state; for bare `dvc`, too.", "`/var/tmp/ropeway-UID`"),),
    "History": (_V("ROPEWAY_GPU_HOUR_PRICE", "Price of a GPU-hour, in a currency of your own.", "no cost is shown"),),
    "Hugging Face Hub": (
        _V("HF_TOKEN", "Token for gated models and datasets, and for `push-hub`."),
        _V("OPENAI_API_KEY", "Key for the server of `ropeway registry verify --serve`."),
        _V("HF_HUB_OFFLINE", "`1` uses the Hub's cache only. Ranks and the package check always run with it."),
        _V("HF_HUB_CACHE", "Cache of the Hub.", "`$HF_HOME/hub`"),
        _V("HF_HOME", "Folder of the Hub's client.", "`~/.cache/huggingface`"),
        _V("HF_ENDPOINT", "Another server than huggingface.co."),
    ),
    "Prefect": (
        _V(
            "ROPEWAY_ALLOW_HTTP",
            "`1` allows plain HTTP to S3, the Hub, a DVC remote or a git remote on another machine.",
            "refused",
        ),
        _V("PREFECT_API_URL", "Prefect server of the run.", "the workspace's own, else a temporary one"),
        _V("PREFECT_API_AUTH_STRING", "`user:password` for that server."),
        _V("PREFECT_SERVER_API_AUTH_STRING", "`user:password` of `ropeway server`; needed with `--host`."),
        _V(
            "ROPEWAY_SERVER_HOSTS",
            "More names of `ropeway server`, e.g. of a proxy; without a password it answers only its own.",
            "127.0.0.1, localhost, ::1",
        ),
        _V("PREFECT_HOME", "Folder of Prefect's database.", "`.prefect` in the workspace"),
        _V(
            "ROPEWAY_POOL_<STAGE>",
            "Prefect work pool that runs a stage, or `publish`: `ROPEWAY_POOL_TRAIN=gpu`.",
            "here",
        ),
        _V("ROPEWAY_GIT_URL", "Repository that workers of these pools clone.", "the git remote `origin`"),
        _V("ROPEWAY_WORKER_HOME", "Folder of a worker's clones and DVC cache.", "`$XDG_CACHE_HOME/ropeway/worker`"),
        _V(
            "ROPEWAY_WORKER_REPOSITORIES",
            "Repositories that a worker clones: addresses or their beginnings, with commas between them.",
            "all",
        ),
        _V("ROPEWAY_WORKER_SILENCE_SECONDS", "Seconds after which a worker without a sign of life is given up.", "90"),
        _V(
            "ROPEWAY_ALERT_URL",
            "`https://…` to which `ropeway server` posts alerts as JSON, e.g. a Slack webhook.",
            "none",
        ),
        _V("ROPEWAY_ALERT_REVIEW_HOURS", "Hours after which a review that nobody answered is alerted again.", "24"),
        _V("ROPEWAY_ALERT_LATE_MINUTES", "Minutes after which a due run that has not started is alerted.", "30"),
    ),
    "Weights & Biases": (
        _V("WANDB_MODE", "`disabled`, `offline` or `online`.", "online with a key, else offline"),
        _V("WANDB_DISABLED", "`true` is the same as `WANDB_MODE=disabled`."),
        _V("WANDB_API_KEY", "Key; `~/.netrc` is read too."),
        _V("WANDB_PROJECT", "Project.", "`supervised-finetuning`"),
        _V("WANDB_ENTITY", "User or team."),
        _V("WANDB_BASE_URL", "Server of your own.", "`https://api.wandb.ai`"),
        _V("WANDB_ERROR_REPORTING", "`true` lets W&B send reports of its own errors.", "`false`"),
        _V("WANDB_DIR", "Folder of offline runs.", "`.work/wandb`"),
    ),
    "Tests": (_V("ROPEWAY_CHROMIUM", "Browser of `make test-browser`.", "`chromium` on PATH"),),
}
# Set by Ropeway for its own child processes.
INTERNAL = ("ROPEWAY_CODE_CHECK", "ROPEWAY_LOCK_HELD", "ROPEWAY_PROGRESS_FILE", "ROPEWAY_SUPERVISED_BY")
RENAMED = {
    "ROPEWAY_PREPARE_WORKERS": "ROPEWAY_TOKENIZE_WORKERS",
    "ROPEWAY_S3_ALLOW_HTTP": "ROPEWAY_ALLOW_HTTP",
    "ROPEWAY_UNTRIED": "ROPEWAY_SKIP_WARM_UP",
}


def read_count(environment: Mapping[str, str], name: str) -> int | None:
    """Return the whole number that a variable states; None if it is not set or empty.

    Raises:
        ConfigError: It is not a whole number from 1 to 999,999.
    """
    stated = environment.get(name, "")
    if not stated:
        return None
    if not _COUNT.fullmatch(stated) or int(stated) < 1:
        raise ConfigError(f"{name}: expected a whole number from 1 to 999999, found {stated[:_SHOWN]!r}")
    return int(stated)


def check_renamed(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if a variable is set under a name that is no longer read."""
    for old, new in RENAMED.items():
        if old in environment:
            raise ConfigError(f"{old} is set but no longer read; set {new} instead")
