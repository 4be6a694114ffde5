# `make repro` runs the whole job, `make test` its tests; both install what they need into .venv first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# DVC runs each stage's `python` from PATH, so the virtual environment comes first there.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

# Nobody is told that you ran this.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_DISABLE_AGENT_HINT := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT := false
export PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS := false
export PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY := false
# What a loaded machine needs to start Prefect's own server.
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS := 120

# VLMEvalKit and DVC cannot share an environment (antlr4), so the kit's package alone goes into a folder of its own.
VLMEVAL := ms-vlmeval==0.0.20 validators==0.36.0 sty==1.0.6
KITS := $(VENV)/.kits

# Its torch is built for CUDA, as torchvision is: an environment of its own, and other releases than constraints.txt has.
VISION_VENV := .venv-vision
VISION := torch==2.14.1 torchvision==0.29.1
VISION_TESTS := tests/families tests/models tests/dataset tests/rows tests/test_dry_run.py tests/pipeline

# The documentation is read from the source, so building it needs nothing of the project's own environment.
SITE_VENV := .venv-docs

.DEFAULT_GOAL := help
.PHONY: help venv kits vlmeval-env data repro flow plan test test-live test-vision faults check format docs

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "  PYTHON=... chooses the interpreter that .venv is made with (3.11 or newer)."

venv: $(STAMP) ## install everything into .venv (again only when pyproject.toml or constraints.txt change)

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not there or is older than 3.11. Name another: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): some minutes the first time, 2 to 3 GB."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pipeline,dev]'
	@touch $@

kits: $(KITS) ## add lm-eval, a server's client, and VLMEvalKit without its 75 dependencies (`alignti evaluate --kit`)

$(KITS): $(STAMP)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[kits]'
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/vlmeval $(VLMEVAL)
	@touch $@

vlmeval-env: ## VLMEvalKit with them, in .venv-vlmeval, for its own benchmarks (some GB); CHECKOUT=/path/to/a/clone takes that
	@test -x .venv-vlmeval/bin/pip || $(PYTHON) -m venv .venv-vlmeval
	@.venv-vlmeval/bin/python -m pip install --quiet --disable-pip-version-check $(if $(CHECKOUT),-e '$(CHECKOUT)',ms-vlmeval==0.0.20)
	@.venv-vlmeval/bin/python -c 'import vlmeval.dataset' && echo "alignti evaluate --kit vlmeval --task BENCHMARK now works."

data: $(STAMP) ## fetch the raw data that data.dvc names, and record in it what is new under data/
	@$(IN_VENV) python -m flows.raw_data

repro: data ## the whole job, only what changed; independent stages at the same time, JOBS=1 for one after another, V=1 for all they say
	@$(IN_VENV) python -m flows.parallel $(if $(JOBS),--jobs $(JOBS)) $(if $(V),-v)
	@echo "The report: file://$(CURDIR)/reports/report.html (its figures: reports/compare.json)"

flow: data ## the same stages through Prefect, in the order of DVC's graph
	@$(IN_VENV) python -m flows.pipeline
	@echo "The report: file://$(CURDIR)/reports/report.html (its figures: reports/compare.json)"

plan: $(STAMP) ## what `make repro` would run, why, and how long that takes
	@$(IN_VENV) alignti plan

test: $(KITS) ## the tests, offline
	@$(IN_VENV) python -m pytest -n 2 --dist loadfile -m "not live" $(TESTS)

test-live: $(KITS) ## those that run servers, workers and nights for minutes
	@$(IN_VENV) python -m pytest -n 2 --dist loadfile -m live $(TESTS)

test-vision: $(VISION_VENV)/.installed ## with torchvision, as GPU boxes have it, in .venv-vision (7 GB): what opens images
	@PATH="$(CURDIR)/$(VISION_VENV)/bin:$$PATH" python -m pytest -n 2 --dist loadfile -m "not live" $(or $(TESTS),$(VISION_TESTS))

$(VISION_VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(VISION_VENV)/bin/pip || $(PYTHON) -m venv $(VISION_VENV)
	@grep -vE '^torch(vision)?==' constraints.txt >$(VISION_VENV)/constraints.txt
	@$(VISION_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VISION_VENV)/constraints.txt \
		-e '.[pipeline,dev,vision]' $(VISION)
	@touch $@

MINUTES ?= 60
faults: $(STAMP) ## break things at random for MINUTES=60 and say what did not hold; ARGS="--seed 7 --kinds kill" (docs/reliability.md)
	@own= ; unshare --mount true 2>/dev/null && own="unshare --mount" ; \
	$(IN_VENV) $$own python -m tests.campaign --minutes $(MINUTES) $(ARGS)  # what it mounts ends with it, killed too

check: $(STAMP) ## lint, format, types, and a dry validation of every recipe
	@$(IN_VENV) ruff check .
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) mypy
	@$(IN_VENV) alignti check --all-recipes

docs: $(SITE_VENV)/.installed ## the documentation as a site, in site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/mkdocs build --strict --quiet
	@echo "The documentation: file://$(CURDIR)/site/index.html"

$(SITE_VENV)/.installed: constraints.txt
	@test -x $(SITE_VENV)/bin/pip || $(PYTHON) -m venv $(SITE_VENV)
	@$(SITE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs-material mkdocstrings-python ruff
	@touch $@

format: $(STAMP) ## rewrite the code the way `check` wants it
	@$(IN_VENV) ruff check --fix .
	@$(IN_VENV) ruff format .
