# Every target works from a clean clone, without a terminal, and is what CI calls. `make` alone prints this list.
#
#   make install PYTHON=python3.12                          another interpreter for a new .venv
#   make install EXTRAS=tracking,data                       fewer extras, here without DeepSpeed
#   make test TESTS=tests/cli/test_cli.py ARGS="-k help -x"     some tests, arguments for pytest
#   make test JOBS=1                                        one test at a time; by default two
#
#   make train-vqgan CONFIG=launch/recipes/digits_vqgan.yaml OUT=runs/a      options from a recipe, one process
#   make train-vqgan DATA=images OUT=runs/a NPROC=8 ARGS="--image_size 64"   other options are those of vqdist
#   make train-dvae CONFIG=RECIPE OUT=runs/b NPROC=8 BACKEND=deepspeed ZERO=2   by deepspeed_configs/zero2.json
#   make train-ar MODEL=prior TOKENIZER=runs/a DATA=images OUT=runs/c BACKEND=fsdp2 NPROC=8
#   make encode RUN=runs/a DATA=images OUT=codes NPROC=8    the codes of images, by a tokenizer
#   make sample RUN=runs/c OUT=samples.png NUM=64           images, by a model of codes
#   make slurm-submit MODEL=vqgan CONFIG=RECIPE OUT=runs/a NODES=2 SBATCH="--partition gpu --time 1-0"
#
# NPROC: processes on this machine (in a Slurm job: on each node). BACKEND: auto, local, accelerate, deepspeed or fsdp2.
# ZERO: which deepspeed_configs/zeroZERO.json. MODEL: prior, var or vq_ar; to Slurm also vqgan or dvae. SCRIPT: another
# of launch/slurm/, with ARGS only. ARGS: more options, as for vqdist.

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
.PHONY: help install demo test test-fast test-dist test-faults test-cluster test-browser test-mutations test-nightly test-latest support-table reliability-table docs docs-pictures docs-notebook costs results lint quality style bench dalle-checkpoint digit-classifier \
  doctor train-vqgan train-dvae train-ar encode sample slurm-submit build clean

# What a target of the user's work takes and cannot do without (`|` is "or"), and how it is called.
LAYOUT := NPROC BACKEND
OVER_TOKENIZER := $(if $(filter prior var,$(MODEL)),TOKENIZER|CONFIG)
NEEDS.train-vqgan := OUT DATA|CONFIG
TAKES.train-vqgan := OUT DATA CONFIG ZERO $(LAYOUT)
USE.train-vqgan := make train-vqgan DATA=images OUT=runs/a ARGS="--image_size 64"
NEEDS.train-dvae := $(NEEDS.train-vqgan)
TAKES.train-dvae := $(TAKES.train-vqgan)
USE.train-dvae := make train-dvae DATA=images OUT=runs/b ARGS="--image_size 64"
NEEDS.train-ar := MODEL OUT DATA|CONFIG $(OVER_TOKENIZER)
TAKES.train-ar := MODEL TOKENIZER $(TAKES.train-vqgan)
USE.train-ar := make train-ar MODEL=prior TOKENIZER=runs/a DATA=images OUT=runs/c
NEEDS.encode := RUN DATA OUT
TAKES.encode := RUN DATA OUT $(LAYOUT)
USE.encode := make encode RUN=runs/a DATA=images OUT=codes
NEEDS.sample := RUN OUT
TAKES.sample := RUN OUT NUM $(LAYOUT)
USE.sample := make sample RUN=runs/c OUT=samples.png
NEEDS.slurm-submit := NODES $(if $(SCRIPT),ARGS,MODEL OUT DATA|CONFIG $(OVER_TOKENIZER))
TAKES.slurm-submit := NODES NPROC SBATCH $(if $(SCRIPT),SCRIPT,MODEL TOKENIZER OUT DATA CONFIG BACKEND ZERO)
USE.slurm-submit := make slurm-submit NODES=2 MODEL=vqgan CONFIG=launch/recipes/digits_vqgan.yaml OUT=runs/a

ALL_TAKEN := $(sort $(TAKES.train-ar) $(TAKES.encode) $(TAKES.sample) $(TAKES.slurm-submit) SCRIPT)
one_of = $(if $($(2)),$(if $(filter $(3),$($(2))),,$(error $(2)=$($(2)) is not known to $(1); it is one of: $(strip $(3)))))
given_one = $(strip $(foreach name,$(subst |, ,$(1)),$($(name))))
either = $(subst |, or ,$(1))

# A misspelt variable would be ignored, and a number that is none would end in a launcher's traceback.
KNOWN := PYTHON VENV EXTRAS TESTS JOBS ARGS $(ALL_TAKEN)
$(foreach name,$(filter-out $(KNOWN) -%,$(.VARIABLES)),$(if $(filter command,$(origin $(name))),\
  $(error $(name) is no variable of this Makefile; there are: $(KNOWN))))
$(foreach name,NPROC NODES NUM,$(if $($(name)),$(if $(shell expr '$($(name))' : '[1-9][0-9]*$$'),\
  $(if $(filter 0,$(shell expr '$($(name))' : '[1-9][0-9]*$$')),$(error $(name)=$($(name)) is no whole number from 1 on)))))

# Before anything is installed or started: what is missing, or given and not taken, ends make with one line.
define check
$(foreach needed,$(NEEDS.$(1)),$(if $(call given_one,$(needed)),,$(error $(call either,$(needed)) is missing: $(USE.$(1)))))
$(foreach name,$(filter-out $(TAKES.$(1)),$(ALL_TAKEN)),\
  $(if $(filter command,$(origin $(name))),$(error $(1) takes no $(name): $(USE.$(1)))))
$(call one_of,$(1),BACKEND,$(if $(filter slurm-submit,$(1)),,auto local fsdp2) accelerate deepspeed)
$(call one_of,$(1),MODEL,$(if $(filter slurm-submit,$(1)),vqgan dvae) prior var vq_ar)
$(call one_of,$(1),ZERO,$(patsubst deepspeed_configs/zero%.json,%,$(sort $(wildcard deepspeed_configs/zero*.json))))
$(if $(ZERO),$(if $(filter deepspeed,$(BACKEND)),,$(error ZERO=$(ZERO) belongs to BACKEND=deepspeed)))
$(if $(filter fsdp2,$(BACKEND)),$(if $(filter train-%,$(1)),,$(error BACKEND=fsdp2 is for the targets train-*)))
endef
$(foreach goal,$(MAKECMDGOALS),$(if $(NEEDS.$(goal)),$(if $(strip $(call check,$(goal))),)))

help: ## print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  %-16s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## create .venv, install vqdist with every extra, build DeepSpeed's CPU op (nothing to do the second time)
	@for lock in $(VENV)/torch_extensions/*/lock; do \
	  if [ -e "$$lock" ]; then $(OPS) $(BIN)/python -I vqdist/backends/build_ops.py --clear-locks || exit 1; break; fi; \
	done

DEMO := runs/demo

demo: install ## handwritten digits: a tokenizer, its codes, a prior over them, samples; six minutes on two cores
	rm -rf $(DEMO)
	$(BIN)/vqdist train vqgan --config launch/recipes/digits_vqgan.yaml --out $(DEMO)/tokenizer
	$(BIN)/vqdist encode $(DEMO)/tokenizer --data digits --out $(DEMO)/codes
	$(BIN)/vqdist train prior --config launch/recipes/digits_prior.yaml --tokenizer $(DEMO)/tokenizer \
	  --data codes:$(DEMO)/codes --out $(DEMO)/prior
	$(BIN)/vqdist sample $(DEMO)/prior --num 100 --cfg 2 --top_k 64 --out $(DEMO)/samples.png
	@echo; $(BIN)/vqdist report $(DEMO)/tokenizer $(DEMO)/prior
	@echo; echo "digits drawn by the prior, a column each from 0 to 9: $(DEMO)/samples.png"

# Files of tests side by side (a file's tests share what they set up), in the order of their names, one thread each.
# Those of tests/cluster/ and tests/browser/ need root and packages of the system. Whoever names tests runs all of them, nightly ones too.
PYTEST = OMP_NUM_THREADS=1 $(OPS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
IN_PARTS = $(PYTEST) --ignore tests/cluster --ignore tests/browser $(TESTS)
ON_PUSH := $(if $(filter tests,$(TESTS)),not nightly,nightly or not nightly)

test: install ## run the tests of every push: a quarter of an hour on two cores
	$(IN_PARTS) -m "$(ON_PUSH)" $(ARGS)

test-fast: install ## run those of them that need one process only
	$(IN_PARTS) -m "($(ON_PUSH)) and not distributed" $(ARGS)

test-dist: install ## run those of them that start several processes
	$(IN_PARTS) -m "($(ON_PUSH)) and distributed" $(ARGS)

test-faults: install ## run the tests that kill, signal, wait or install
	$(PYTEST) tests/faults $(ARGS)

test-cluster: install ## run the tests on a real Slurm, two nodes and MPI (root; installs them with apt)
	bash tests/cluster/install.sh
	$(PYTEST) tests/cluster $(ARGS)

test-browser: install ## run the tests of the page of `vqdist report` in a headless Chromium (root; installs it with apt)
	bash tests/browser/install.sh
	$(PYTEST) tests/browser $(ARGS)

test-mutations: install ## undo promises of the design one by one, and see which test of every push notices
	OMP_NUM_THREADS=1 $(OPS) $(BIN)/python tests/mutations/run.py $(ARGS)

test-nightly: install ## run every test there is: those of every push, all backends, faults, clusters, mutations
	$(IN_PARTS) $(ARGS)
	$(MAKE) test-cluster test-browser test-mutations

# setup.py leaves out the upper bounds where VQDIST_LATEST is set. The metadata that the installation leaves beside the
# sources would hide those of $(VENV).
LATEST := .venv-latest
test-latest: ## run every test with the newest version of each library, in an environment of its own (.venv-latest)
	rm -f $(LATEST)/.vqdist-installed
	VQDIST_LATEST=1 $(MAKE) install VENV=$(LATEST)
	rm -rf vqdist.egg-info
	$(MAKE) test VENV=$(LATEST)

support-table: install ## write docs/support.md anew: what works on which backend, by what two processes come to
	VQDIST_WRITE_SUPPORT_TABLE=1 OMP_NUM_THREADS=1 $(OPS) $(BIN)/python -m pytest tests/contract/test_distributed.py $(ARGS)

reliability-table: install ## run the campaign of faults, and write its counts into docs/reliability.md
	VQDIST_WRITE_RELIABILITY=1 $(PYTEST) $(wildcard tests/faults/test_campaign_*.py) $(ARGS)

# A dead link, an anchor that is not there and an unknown name of the API are errors. Nothing is fetched.
docs: install ## build the site of docs/ into site/, checked strictly (Python 3.11 or newer)
	@[ -x $(BIN)/zensical ] || { echo "the site needs Python 3.11 or newer and the extra docs: make install EXTRAS=$(EXTRAS),docs" >&2; exit 1; }
	$(BIN)/zensical build --strict --clean

docs-pictures: install ## write the pictures and outputs of the tutorial anew, by its own commands; some minutes
	$(OPS) $(BIN)/python -m benchmarks.pictures

costs: install ## write docs/costs.md anew: what each recipe takes, by a rule
	$(BIN)/python -m benchmarks.costs

results: install ## measure what docs/results.md shows, and write it anew: DATA=emoji64.tar; an hour on two cores
	@[ -n '$(DATA)' ] || { echo "DATA is missing: make results DATA=emoji64.tar, a folder or a tar of images" >&2; exit 1; }
	rm -f runs/results/curves.jsonl runs/results/emoji.jsonl
	$(OPS) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.curves
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.emoji --data '$(DATA)'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rivals
	$(BIN)/python -m benchmarks.results

docs-notebook: install ## run docs/tutorial.ipynb and store its outputs
	$(BIN)/python -m benchmarks.notebook

SHELL_FILES := .ci/run tests/cluster/install.sh tests/browser/install.sh launch/env.sh $(wildcard launch/slurm/*)

lint: install ## check style, types, layering, shell files and spelling, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SHELL_FILES)
	$(BIN)/codespell
	$(BIN)/python tests/prose.py

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

# One process is plain vqdist, several are torchrun's; FSDP2 is what Accelerate's launcher is told of.
SEVERAL := $(filter-out 1,$(NPROC))
ifeq ($(BACKEND),fsdp2)
  LAUNCH = $(BIN)/accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes $(or $(NPROC),1) -m vqdist
  BACKEND_OPTIONS := --backend accelerate
else
  LAUNCH = $(if $(SEVERAL),$(BIN)/torchrun --standalone --nproc_per_node $(NPROC) -m vqdist,$(BIN)/vqdist)
  BACKEND_OPTIONS := $(if $(BACKEND),--backend $(BACKEND)) \
    $(if $(ZERO),--deepspeed_config deepspeed_configs/zero$(ZERO).json)
endif
option = $(if $($(2)),$(1) '$($(2))')
TRAIN_OPTIONS = $(call option,--config,CONFIG) $(call option,--tokenizer,TOKENIZER) $(call option,--data,DATA) \
  $(call option,--out,OUT)

train-vqgan: install ## train a VQGAN: OUT and DATA or CONFIG [NPROC BACKEND ZERO ARGS]
	$(LAUNCH) train vqgan $(TRAIN_OPTIONS) $(BACKEND_OPTIONS) $(ARGS)

train-dvae: install ## train a discrete VAE: OUT and DATA or CONFIG [NPROC BACKEND ZERO ARGS]
	$(LAUNCH) train dvae $(TRAIN_OPTIONS) $(BACKEND_OPTIONS) $(ARGS)

train-ar: install ## train a model of codes: MODEL, TOKENIZER, OUT and DATA or CONFIG [NPROC BACKEND ZERO ARGS]
	$(LAUNCH) train $(MODEL) $(TRAIN_OPTIONS) $(BACKEND_OPTIONS) $(ARGS)

encode: install ## store the codes of images: RUN DATA OUT [NPROC BACKEND ARGS]
	$(LAUNCH) encode '$(RUN)' --data '$(DATA)' --out '$(OUT)' $(BACKEND_OPTIONS) $(ARGS)

# --num_images, because torchrun takes --num for an option of its own
sample: install ## draw images: RUN OUT [NUM NPROC BACKEND ARGS]
	$(LAUNCH) sample '$(RUN)' $(if $(NUM),--num_images $(NUM)) --out '$(OUT)' $(BACKEND_OPTIONS) $(ARGS)

# The scripts find the processes of a node by themselves; NPROC says it where they cannot, as on a CPU.
SLURM_VARIABLES = $(if $(NPROC),VQDIST_PROCESSES=$(NPROC)) $(if $(ZERO),ZERO=$(ZERO))
ifneq ($(SCRIPT),)
  JOB = $(SCRIPT)
else ifeq ($(BACKEND),deepspeed)
  JOB = launch/slurm/train_deepspeed.sbatch $(MODEL) $(TRAIN_OPTIONS)
else
  JOB = launch/slurm/train_accelerate.sbatch $(MODEL) $(TRAIN_OPTIONS)
endif

slurm-submit: ## submit a training to Slurm: NODES MODEL OUT and DATA or CONFIG [NPROC BACKEND ZERO SBATCH SCRIPT ARGS]
	$(SLURM_VARIABLES) sbatch --nodes $(NODES) $(SBATCH) $(JOB) $(ARGS)

build: install ## make the wheel and the source archive in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation .

clean: ## remove caches and build products; .venv and runs stay
	rm -rf build dist site .cache vqdist.egg-info .pytest_cache .ruff_cache .mypy_cache
	find $(wildcard vqdist tests benchmarks launch) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "vqdist needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "could not create $(VENV); on Debian and Ubuntu the module comes with: apt-get install python3-venv" >&2; exit 1; }

UPGRADE := $(if $(VQDIST_LATEST),--upgrade)
# uv installs several times faster; where it cannot be had, pip does the same.
$(STAMP): setup.py pyproject.toml vqdist/version.py | $(BIN)/python
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	@if $(BIN)/python -m pip install --quiet uv; then \
	  echo "installing vqdist[$(EXTRAS)] with uv"; \
	  $(BIN)/uv pip install $(UPGRADE) --python $(BIN)/python -e '.[$(EXTRAS)]'; \
	else \
	  echo "uv cannot be had here: installing vqdist[$(EXTRAS)] with pip"; \
	  $(BIN)/python -m pip install $(UPGRADE) -e '.[$(EXTRAS)]'; \
	fi
	@$(OPS) $(BIN)/python -m vqdist.backends.build_ops
	@touch $@
