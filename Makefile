# Two commands: `make report` runs the whole report small, from scratch; `make test` checks it.

PYTHON ?= python3
PROFILE ?= paper
BUILD ?= $(CURDIR)/build
BIN := .venv/bin
READY := .venv/ready
SITE := $(BIN)/python notebooks/site/build.py
EXPORT := $(BIN)/python notebooks/site/export.py
LAST := notebooks/00_read_the_report.ipynb
NOTEBOOKS := $(sort $(filter-out $(LAST),$(wildcard notebooks/*.ipynb))) $(LAST)

path = $(if $(wildcard $1),$(abspath $1),$1)# what is there as an absolute path

export BUILD
report paper: export OMP_WAIT_POLICY ?= active# trains faster; elsewhere spinning threads hinder

help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

report: export PROFILE := $(if $(filter smoke,$(PROFILE)),smoke,quick)
report: $(READY) ## run the quick profile from scratch; notebooks, HTML, figures in build/quick
	@mkdir -p $(BUILD)/$(PROFILE)
	@$(MAKE) --no-print-directory notebooks TO="--output-dir $(BUILD)/$(PROFILE)"
	@$(SITE) $(BUILD)/$(PROFILE) $(BUILD)/$(PROFILE)/figures $(BUILD)/$(PROFILE)/html
	@echo "Done. Open $(BUILD)/$(PROFILE)/html/00_read_the_report.html"

paper: export PROFILE = paper
paper: $(READY) ## run the committed notebooks in place: load what is stored, compute the rest
	@$(MAKE) --no-print-directory notebooks TO=--inplace
	@$(EXPORT) figures notebooks figures/README.md

figures: export PROFILE = paper
figures: export VENUE := $(or $(VENUE),default)
figures: $(READY) ## [VENUE=neurips|icml|acl|nature]: every figure and table at a venue's sizes
	@$(BIN)/python -c "import utils; utils.set_style()"
	@mkdir -p $(BUILD)/figures/$(VENUE)
	@$(MAKE) --no-print-directory notebooks TO="--output-dir $(BUILD)/figures/$(VENUE)/notebooks"
	@$(EXPORT) tables $(BUILD)/figures/$(VENUE)/notebooks $(BUILD)/figures/$(VENUE)/tables
	@echo "Done: $(BUILD)/figures/$(VENUE) has the figures, its tables/ the LaTeX"

notebooks: # run the sequence; 00 comes last, since it sums up the others
	@set -e; progress=$$(tty -s && tty || echo off); n=0; for notebook in $(NOTEBOOKS); do \
		n=$$((n + 1)); echo "notebook $$n of $(words $(NOTEBOOKS)): $$notebook ($$PROFILE)"; \
		PROGRESS=$$progress NOTEBOOK=$$(basename $$notebook .ipynb) $(BIN)/jupyter nbconvert \
			--log-level ERROR --to notebook --execute --ExecutePreprocessor.record_timing=False \
			--ExecutePreprocessor.extra_arguments=--log-level=ERROR \
			$(TO) $$notebook; \
	done

test: $(READY) ## run the tests
	@$(BIN)/python -m pytest -q

lint: $(READY) ## check style and format of modules and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

html: $(READY) ## build the report as a static site in build/html, from what is committed
	@$(SITE) notebooks figures $(BUILD)/html
	@echo "Done. Open $(BUILD)/html/index.html"

test-browser: $(READY) ## test site and figures as readers see them (needs chromium: apt-get install chromium)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-browser.txt
	@$(BIN)/python -m pytest -q tests/browser_*.py

inspect: export PROFILE = inspect
inspect: $(READY) ## BASE=… TUNED=… [TASK=…] [OUT=…]: spectra, ranks and adapter of your own models
	@test -n "$(BASE)" -a -n "$(TUNED)" || { \
		echo "Say which: make inspect BASE=folder TUNED=folder [TASK=sentiment or rows.jsonl]"; exit 2; }
	@mkdir -p $(BUILD)/inspect && rm -rf $(BUILD)/inspect/figures
	@BASE="$(call path,$(BASE))" TUNED="$(call path,$(TUNED))" TASK="$(call path,$(TASK))" \
		OUT="$(if $(OUT),$(abspath $(OUT)))" PROGRESS=$$(tty -s && tty || echo off) \
		$(BIN)/jupyter nbconvert --log-level ERROR --to html --execute --no-input \
		--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=report-only \
		--output-dir $(BUILD)/inspect notebooks/08_inspect_your_checkpoints.ipynb
	@cat $(BUILD)/inspect/verdict.txt
	@echo "Open $(BUILD)/inspect/08_inspect_your_checkpoints.html"

bench: $(READY) ## time training, spectra and pairs against stock recipes [ONLY=pairs] [RECORD=yes]
	@$(BIN)/python tests/bench.py $(ONLY)

lab: $(READY) ## open JupyterLab
	@$(BIN)/jupyter lab notebooks

lock: $(READY) ## write requirements.lock from what is installed, for every platform
	@$(BIN)/python -m pip install -q uv
	@$(BIN)/python -m pip freeze | sed -E 's/\+[a-z0-9.]+$$//' \
		| grep -vE '^(beautifulsoup4|soupsieve)=' > .cache/installed.txt
	@$(BIN)/uv pip compile -q --universal --no-header --no-annotate --python-version 3.11 \
		-c .cache/installed.txt requirements.txt | grep -vE '^(nvidia|cuda|triton)' > requirements.lock

clean: ## remove what was built; the store, the cache and .venv stay
	@rm -rf build data/*/.tmp-* .pytest_cache .ruff_cache __pycache__ tests/__pycache__

$(READY): requirements.txt requirements.lock
	@$(PYTHON) -c "import sys; v = sys.version_info; v < (3, 11) and sys.exit( \
		'Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12' % v[:2])"
	@echo "Installing into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt \
		-c requirements.lock
	@touch $(READY)

.PHONY: help report paper figures notebooks test lint html test-browser inspect bench lab lock clean
.DEFAULT_GOAL := help
