# Everything a clone needs, through pip and the virtual environment .venv in this folder.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The torch build to install first: a plain requirement would bring the one for CUDA, several GB, where pip's index
# has no other. For a CPU build, point pip at an index that has one, or: make setup TORCH=path/to/wheel
TORCH ?= torch==2.13.0
# More arguments for pytest: make test ARGS='-m "not slow"'
ARGS ?=

VENV := .venv
# Changes when the pins, the torch build or this folder's place do: then setup runs again.
KEY := $(shell (cat pyproject.toml constraints.txt; echo '$(TORCH) $(CURDIR)') | cksum | tr ' ' '-')
STAMP := $(VENV)/.setup-$(KEY)
LOG := $(VENV)/setup.log
IMPORTS := .cache/import_tree

.DEFAULT_GOAL := help
.PHONY: help setup test quickstart lint clean

help:  ## list what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1\t/' | expand -t 17

setup: $(STAMP)  ## make .venv with all that training and tests need (quick when nothing changed)
	@echo "setup: $(VENV) is ready"

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v[:2] == (3, 11) else f"setup: {sys.executable} is Python {v[0]}.{v[1]}; the pins in constraints.txt are for Python 3.11. Install it, or name it: make setup PYTHON=/path/to/python3.11")'
	@$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	  || { echo "setup: virtual environment $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $(VENV)/.setup-*
	@: > $(LOG)
	@echo "setup: $(TORCH) (log: $(LOG))"
	@$(VENV)/bin/python -m pip install --disable-pip-version-check '$(TORCH)' >> $(LOG) 2>&1 \
	  || { tail -n 30 $(LOG); echo "setup: pip failed; the whole log is $(LOG)"; exit 1; }
	@echo "setup: kvcat-nemo with NeMo, Megatron-core and the tools for tests (some minutes the first time)"
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,dev]' >> $(LOG) 2>&1 \
	  || { tail -n 30 $(LOG); echo "setup: pip failed; the whole log is $(LOG)"; exit 1; }
	@touch $@

test: setup  ## run the tests
	$(VENV)/bin/python -m pytest --durations=15 $(ARGS)

quickstart: setup  ## continued pretraining of a real model on real text, from nothing to the report
	$(VENV)/bin/python -m kvcat_nemo.quickstart

# import-linter reads folders: it is shown the package as it is installed, recipes/ and conversion/ inside.
lint: setup  ## check style and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@rm -rf $(IMPORTS) && mkdir -p $(IMPORTS)
	@cp -R kvcat_nemo $(IMPORTS)/ && cp -R recipes conversion $(IMPORTS)/kvcat_nemo/
	cd $(IMPORTS) && $(CURDIR)/$(VENV)/bin/lint-imports --no-logo --no-cache --config $(CURDIR)/.importlinter

clean:  ## remove caches (keeps .venv, models, data and results)
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis $(IMPORTS)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
