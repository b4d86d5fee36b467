PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env book lab test lint format figure bench evidence strip clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(INSTALLED) ## make .venv and install everything into it

$(INSTALLED): requirements.txt pyproject.toml book/kernel.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed:" \
	         "make env PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps --editable . \
	    --config-settings editable_mode=compat
	$(VENV)/bin/python book/kernel.py
	$(VENV)/bin/python -m bnnlib.kernels.compiled
	@touch $@

book: env ## execute the chapters and render them to _build/html/index.html
	@$(VENV)/bin/python book/build.py

lab: env ## open the chapters in JupyterLab, to change and rerun them
	$(VENV)/bin/jupyter lab --notebook-dir book

test: env ## run the unit tests, and every chapter at its smallest size
	$(VENV)/bin/python -m pytest --numprocesses logical --dist worksteal

lint: env ## check the formatting and the code of modules and notebooks
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: env ## format modules and notebooks
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

figure: env ## draw the figure of the README from the stored runs
	$(VENV)/bin/python book/figure.py

bench: env ## time a training step beside other programs' and draw the results
	$(VENV)/bin/python -m benchmarks.training

evidence: env ## write results/ledger.csv and results/claims.json from the stored runs
	$(VENV)/bin/python book/evidence.py

strip: env ## remove the outputs from the notebooks of the book
	$(VENV)/bin/python book/strip.py

clean: ## remove what was built; .venv stays
	rm -rf _build .pytest_cache .ruff_cache .hypothesis *.egg-info
