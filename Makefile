# Every target works from a clean clone, without a terminal, and is what CI calls. `make` alone prints this list.
#
#   make install PYTHON=python3.12                          another interpreter for a new .venv
#   make install EXTRAS=tracking,data                       fewer extras, here without DeepSpeed
#   make test TESTS=tests/test_cli.py ARGS="-k help -x"     some tests, arguments for pytest
#   make test JOBS=1                                        one test at a time; by default two

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= deepspeed,tracking,data,dev
TESTS ?= tests
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.vqdist-installed
# The environment's own folder for what DeepSpeed compiles.
OPS = TORCH_EXTENSIONS_DIR="$$(cd $(VENV) && pwd)/torch_extensions"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-fast test-dist lint quality style bench dalle-checkpoint digit-classifier doctor build clean

help: ## print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  %-16s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## create .venv, install vqdist with every extra, build DeepSpeed's CPU op (nothing to do the second time)
	@for lock in $(VENV)/torch_extensions/*/lock; do \
	  if [ -e "$$lock" ]; then $(OPS) $(BIN)/python -I vqdist/backends/build_ops.py --clear-locks || exit 1; break; fi; \
	done

DEMO := runs/demo

demo: install ## handwritten digits: a tokenizer, its codes, a prior over them, samples; four minutes on two cores
	rm -rf $(DEMO)
	$(BIN)/vqdist train vqgan --config launch/recipes/digits_vqgan.yaml --out $(DEMO)/tokenizer
	$(BIN)/vqdist encode $(DEMO)/tokenizer --data digits --out $(DEMO)/codes
	$(BIN)/vqdist train prior --config launch/recipes/digits_prior.yaml --tokenizer $(DEMO)/tokenizer \
	  --data codes:$(DEMO)/codes --out $(DEMO)/prior
	$(BIN)/vqdist sample $(DEMO)/prior --num 100 --cfg 2 --top_k 64 --out $(DEMO)/samples.png
	@echo; $(BIN)/vqdist report $(DEMO)/tokenizer $(DEMO)/prior
	@echo; echo "digits drawn by the prior, a column each from 0 to 9: $(DEMO)/samples.png"

# Files of tests side by side (a file's tests share what they set up), one thread each: much of a test is start-up.
PYTEST = OMP_NUM_THREADS=1 $(OPS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

test: install ## run every test
	$(PYTEST) $(ARGS)

test-fast: install ## run the tests that need one process only
	$(PYTEST) -m "not distributed" $(ARGS)

test-dist: install ## run the tests that start several processes
	$(PYTEST) -m distributed $(ARGS)

lint: install ## check style and layering, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

quality: lint ## the same as lint

style: install ## mend what lint finds, as far as it can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## measure speed, memory and traffic against plain loops
	$(BIN)/python -m benchmarks.run $(ARGS)

dalle-checkpoint: install ## write tests/data/dalle_pytorch anew with the real DALLE-pytorch, in an environment of its own
	PYTHONPATH=. "$$($(BIN)/python -m benchmarks.ancestors dalle)" tests/dalle_checkpoint.py

digit-classifier: install ## train the feature extractor that scores samples of digits: runs/digit_classifier.pt
	$(BIN)/python -m benchmarks.digit_classifier --out runs/digit_classifier.pt

doctor: install ## say what works on this machine and what would mend the rest
	@$(BIN)/vqdist doctor

build: install ## make the wheel and the source archive in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation .

clean: ## remove caches and build products; .venv and runs stay
	rm -rf build dist vqdist.egg-info .pytest_cache .ruff_cache
	find $(wildcard vqdist tests benchmarks launch) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "vqdist needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "could not create $(VENV); on Debian and Ubuntu the module comes with: apt-get install python3-venv" >&2; exit 1; }

# uv installs several times faster; where it cannot be had, pip does the same.
$(STAMP): setup.py pyproject.toml vqdist/version.py | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	@if $(BIN)/python -m pip install --quiet uv; then \
	  echo "installing vqdist[$(EXTRAS)] with uv"; \
	  $(BIN)/uv pip install --python $(BIN)/python -e '.[$(EXTRAS)]'; \
	else \
	  echo "uv cannot be had here: installing vqdist[$(EXTRAS)] with pip"; \
	  $(BIN)/python -m pip install -e '.[$(EXTRAS)]'; \
	fi
	@$(OPS) $(BIN)/python -m vqdist.backends.build_ops
	@touch $@
