# Two commands: `make report` runs the whole report small, from scratch; `make test` checks it.

PYTHON ?= python3
PROFILE ?= paper
BUILD ?= $(CURDIR)/build
BIN := .venv/bin
READY := .venv/ready
TESTS := $(BIN)/python -m pytest -q -n 2 --dist loadfile# what a file's tests share is made once
SITE := $(BIN)/python notebooks/site/build.py
FIGURE_LIST := $(BIN)/python notebooks/site/list_figures.py
LAST := notebooks/00_read_the_report.ipynb
NOTEBOOKS := $(sort $(filter-out $(LAST),$(wildcard notebooks/*.ipynb))) $(LAST)

# MODEL=folder, name or hub id: the whole report on that model, in a folder of its own
$(if $(word 2,$(MODEL)),$(error MODEL=$(MODEL) has a space, where make ends a name: link the folder))
override MODEL := $(or $(abspath $(wildcard $(MODEL))),$(MODEL))
FOLDER = $(BUILD)/$(PROFILE)$(if $(MODEL),-$(notdir $(MODEL)))
LEAVE := --TagRemovePreprocessor.enabled=True \
	--TagRemovePreprocessor.remove_cell_tags=paper-only# claims, and what only paper has runs for

export BUILD MODEL
report paper: export OMP_WAIT_POLICY ?= active# trains faster; elsewhere spinning threads hinder

help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

report: override export PROFILE := $(if $(filter smoke,$(PROFILE)),smoke,quick)
report: $(READY) ## [MODEL=yours]: run the quick profile from scratch; notebooks, HTML, figures in build
	$(elsewhere)

define elsewhere
	@mkdir -p "$(FOLDER)"
	@$(MAKE) --no-print-directory notebooks TO="--output-dir '$(FOLDER)' $(LEAVE)"
	@$(SITE) "$(FOLDER)" "$(FOLDER)/figures" "$(FOLDER)/html" $(if $(MODEL),"$(MODEL)")
	@echo "Done. Open $(FOLDER)/html/00_read_the_report.html"
endef

paper: override export PROFILE = paper
ifdef MODEL
paper: $(READY)
	$(elsewhere)
else
paper: $(READY) ## run the committed notebooks in place: load what is stored, compute the rest
	@$(MAKE) --no-print-directory notebooks TO=--inplace
	@$(FIGURE_LIST) notebooks figures/README.md
endif

figures: override export PROFILE = paper
figures: export VENUE := $(or $(VENUE),default)
figures: $(READY) ## [VENUE=neurips|icml|acl|nature]: every figure and table at a venue's sizes
	@$(BIN)/python -c "import utils; utils.set_style()"
	@mkdir -p "$(BUILD)/figures/$(VENUE)"
	@$(MAKE) --no-print-directory notebooks TO="--output-dir '$(BUILD)/figures/$(VENUE)/notebooks'"
	@echo "Done: $(BUILD)/figures/$(VENUE) has the figures, and the tables as LaTeX"

notebooks: # run the sequence; 00 comes last, since it sums up the others
	@set -e; progress=$$(tty -s && tty || echo off); n=0; for notebook in $(NOTEBOOKS); do \
		n=$$((n + 1)); echo "notebook $$n of $(words $(NOTEBOOKS)): $$notebook ($$PROFILE)"; \
		PROGRESS=$$progress NOTEBOOK=$$(basename $$notebook .ipynb) $(BIN)/jupyter nbconvert \
			--log-level ERROR --to notebook --execute --ExecutePreprocessor.record_timing=False \
			--ExecutePreprocessor.extra_arguments=--log-level=ERROR \
			$(TO) $$notebook; \
	done

test: $(READY) ## run the quick tests
	@$(TESTS) -m "not slow"

test-slow: $(READY) ## run the tests that train, kill, build llama.cpp or run whole notebooks
	@$(TESTS) -rs -m slow

lint: $(READY) ## check style, format and types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

html: $(READY) ## build the report as a static site in build/html, from what is committed
	@$(SITE) notebooks figures "$(BUILD)/html"
	@echo "Done. Open $(BUILD)/html/index.html"

gallery: $(READY) ## inspect the site's three examples anew (trained again where the cache has lost them)
	@$(BIN)/python notebooks/site/inspect_examples.py data/gallery

test-browser: $(READY) ## test site and figures as readers see them (needs chromium: apt-get install chromium)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e .[browser] -c requirements.lock
	@$(TESTS) tests/browser_*.py

inspect: $(READY) ## BASE=… TUNED=… [TASK=…] [OUT=…]: a page on your own models, their adapter in OUT
	@test -n "$(BASE)" -a -n "$(TUNED)" || { \
		echo "Say which: make inspect BASE=folder TUNED=folder [TASK=sentiment or rows.jsonl]"; exit 2; }
	@mkdir -p "$(BUILD)/inspect"
	@$(BIN)/deltarank inspect "$(BASE)" "$(TUNED)" --html "$(BUILD)/inspect/page.html" \
		$(if $(TASK),--task "$(TASK)")
	@$(if $(OUT),$(BIN)/deltarank extract "$(BASE)" "$(TUNED)" "$(OUT)")

bench: $(READY) ## time training, spectra, pairs, the report; against stock recipes [ONLY=pairs] [RECORD=yes]
	@$(BIN)/python tests/bench.py $(ONLY)

lab: $(READY) ## open JupyterLab
	@$(BIN)/jupyter lab notebooks

lock: $(READY) ## write requirements.lock from what is installed, for every platform
	@$(BIN)/python -m pip install -q uv
	@mkdir -p .cache
	@$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' \
		| grep -vE '^(beautifulsoup4|soupsieve)=' > .cache/installed.txt
	@$(BIN)/uv pip compile -q --universal --no-header --no-annotate --python-version 3.11 \
		--extra study --extra dev --extra browser -c .cache/installed.txt pyproject.toml \
		| grep -vE '^(nvidia|cuda|triton)' > requirements.lock

clean: ## remove what was built; the store, the cache and .venv stay
	@rm -rf build .cache/.convert-* data/*/.tmp-* data/*/*/.tmp-* .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c "import sys; v = sys.version_info; v < (3, 11) and sys.exit( \
		'Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12' % v[:2])"
	@echo "Installing into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e .[study,dev] \
		-c requirements.lock
	@touch $(READY)

.PHONY: help report paper figures notebooks test test-slow lint html gallery test-browser inspect bench lab lock clean
.DEFAULT_GOAL := help
