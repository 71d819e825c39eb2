# The locked environment and this checkout, for CPUs; docs/tasks/containers.md has the commands.
# `--build-arg TORCH=cuda` installs torch's CUDA build (several GB), `--build-arg UID=$(id -u)` the user who owns a clone
# that is mounted at /workspace.
FROM debian:bookworm-slim

# The packages of README.md; tests/contract/test_containers.py compares the two.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes python3-venv python3-dev make git g++ \
    && rm -rf /var/lib/apt/lists/*

# /prefect is where compose.yaml mounts the server's database.
ARG UID=1000
RUN useradd --uid "$UID" --create-home ropeway \
    && install --directory --owner ropeway --group ropeway /opt/venv /workspace /prefect
USER ropeway
WORKDIR /workspace

# A layer of its own: it changes with the lock files, not with the code. No GPU is visible during a build, so `auto`
# takes the CPU build.
ARG TORCH=auto
COPY --chown=ropeway:ropeway requirements requirements
RUN UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 \
    python3 requirements/install.py --venv /opt/venv --torch "$TORCH" --dependencies smollm2

COPY --chown=ropeway:ropeway . .
RUN UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 python3 requirements/install.py --venv /opt/venv --torch "$TORCH" smollm2 \
    && /opt/venv/bin/python -m ropeway.runtime.op_build

ENV PATH=/opt/venv/bin:$PATH
CMD ["ropeway", "run"]
