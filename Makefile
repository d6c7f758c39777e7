# Two commands do everything on a machine with Python (3.11 or newer) and make:
#   make demo    train, evaluate and show a small any-to-any model
#   make test    lint, types, tests, docs and configs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

RUN := runs/mini
LAST := 3_instruction_tuning

# How training is started. `accelerate launch` gives a CPU process one thread by default.
THREADS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() or 1)")
SHAPE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
LAUNCH = OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --quiet \
	--config_file configs/accelerate/$(SHAPE).yaml

# Everything here works without a model hub, so none is asked.
export HF_HUB_OFFLINE := 1

.PHONY: help demo mini test test-reference test-gpu check lint types docs site dist format install lock clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# --- installation -------------------------------------------------------------------------------

install: $(INSTALLED)  ## make .venv with the pinned packages and mmllm itself

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { \
		echo "mmllm needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "installing into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable .
	@touch $@

lock: $(INSTALLED)  ## choose the newest versions that pyproject.toml allows
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.13"
	$(BIN)/uv pip compile pyproject.toml --extra demo --extra dev --extra server \
		--extra encoders --extra evaluation --universal --upgrade \
		--python-version 3.11 --no-emit-index-url --no-emit-find-links --generate-hashes --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock

# --- the demo: three stages, evaluation, gallery ------------------------------------------------

# Bars on a terminal say by MMLLM_PART which part of all this is being done (mmllm/utils/progress.py).
demo: $(RUN)/evaluation.json $(RUN)/gallery/index.html  ## fetch, train, evaluate, show
	@echo
	@echo "Look:  $(RUN)/gallery/index.html"
	@echo "Talk:  $(BIN)/mmllm chat --model $(RUN)/$(LAST)"
	@echo "       $(BIN)/mmllm demo $(RUN)/$(LAST)        (in the browser)"
	@echo "       $(BIN)/mmllm chat        (the model that is shipped, trained for longer)"

$(RUN)/assets: | $(INSTALLED)
	$(BIN)/mmllm assets fetch
	@mkdir -p $(RUN)
	@touch $@

# A stage that was interrupted goes on where it stopped; one that is finished is left alone.
# Its number is the first character of its name.
$(RUN)/%.trained: configs/mini/%.yaml | $(RUN)/assets
	MMLLM_PART=$(firstword $(subst _, ,$*))/5 $(LAUNCH) train/train.py $< --resume
	@touch $@

$(RUN)/2_decoder_alignment.trained: $(RUN)/1_encoder_alignment.trained
$(RUN)/3_instruction_tuning.trained: $(RUN)/2_decoder_alignment.trained

$(RUN)/evaluation.json: $(RUN)/$(LAST).trained
	MMLLM_PART=4/5 $(BIN)/mmllm evaluate $(RUN)/$(LAST) --short-run --json $@ \
		--baseline mmllm/mini/evaluation.json

$(RUN)/gallery/index.html: $(RUN)/evaluation.json demos/gallery.py
	$(BIN)/python demos/gallery.py --model $(RUN)/$(LAST) --compare mini \
		--scores $(RUN)/evaluation.json --folder $(RUN)/gallery

# --- the shipped model --------------------------------------------------------------------------

LONG := runs/mini-long
LONG_1 ?= stage.prealign.steps=3500 stage.data.pictures.count=40000 \
	stage.data.sounds.count=12000 stage.data.clips.count=8000
LONG_2 ?= stage.steps=900
LONG_3 ?= stage.steps=1080
# Pictures that stand for unknown things: their names are learned before stage 3 and forgotten after it.
STAND_INS = stage.data.stand_ins='{type: labelled, source: $(LONG)/stand_ins, modality: image, \
	direction: understand, prompts: "mini:data/prompts.json\#ask_image.train", \
	replies: ["I see {caption}."], share: 0.16}'

mini: $(RUN)/assets  ## train as `demo` does, for longer, measure and export: what is shipped
	$(LAUNCH) train/train.py configs/mini/1_encoder_alignment.yaml --resume \
		stage.output=$(LONG)/1_encoder_alignment $(LONG_1)
	$(BIN)/python -m tools.mini.stand_ins $(LONG)/stand_ins
	$(BIN)/python -m tools.mini.names $(LONG)/1_encoder_alignment $(LONG)/1_named \
		--also $(LONG)/stand_ins
	$(LAUNCH) train/train.py configs/mini/2_decoder_alignment.yaml --resume \
		stage.output=$(LONG)/2_decoder_alignment stage.init_from=$(LONG)/1_named $(LONG_2)
	$(LAUNCH) train/train.py configs/mini/3_instruction_tuning.yaml --resume \
		stage.output=$(LONG)/3_instruction_tuning \
		stage.init_from=$(LONG)/2_decoder_alignment $(STAND_INS) $(LONG_3)
	$(BIN)/python -m tools.mini.names $(LONG)/3_instruction_tuning $(LONG)/named --anew
	$(BIN)/mmllm export $(LONG)/named mmllm/mini/checkpoint
	$(BIN)/mmllm evaluate mini --json $(LONG)/evaluation.json \
		--summary mmllm/mini/evaluation.json

# --- checks -------------------------------------------------------------------------------------

# Tests are many small tensors, which gain nothing from threads; processes share them out. Each takes
# about 2.5 GB. A third one gains nothing on two cores: a few long tests at the end decide (measured).
WORKERS ?= 2

test: lint  ## everything that must pass before a change is merged
	@mkdir -p build
	@$(BIN)/pyright > build/types.txt & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal; tests=$$?; \
	wait $$types; types=$$?; echo "pyright, meanwhile:"; cat build/types.txt; \
	exit $$((tests + types))

test-reference: $(INSTALLED)  ## the same tests without fast paths: torch, transformers, peft
	MMLLM_KERNELS=reference OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		-n $(WORKERS) --dist worksteal

test-gpu: $(INSTALLED)  ## the checks for a machine with a CUDA device: under five minutes
	$(BIN)/python -m pytest -m gpu -rA tests/gpu

check: lint types docs  ## the checks that take seconds

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

docs: $(INSTALLED)
	$(BIN)/pytest -q tests/test_docs.py tests/test_docstrings.py tests/test_layering.py \
		tests/test_private_names.py tests/cli/test_entry.py

site: $(INSTALLED)  ## the documentation with its API reference: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs/hello.ipynb: demos/hello.py | $(INSTALLED)
	@mkdir -p build
	$(BIN)/jupytext --to ipynb --output build/hello.ipynb $<
	PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --execute --to notebook --inplace build/hello.ipynb
	mv build/hello.ipynb $@

dist: $(INSTALLED)  ## the sdist and the wheel for a package index: dist/
	@rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "twine>=6.1"
	$(BIN)/python -m hatchling build --directory dist
	$(BIN)/python -m twine check --strict dist/*

format: $(INSTALLED)  ## write the code as ruff likes it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete .venv and the caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
