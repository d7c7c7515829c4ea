# Every target makes .venv by itself, once; a second call costs seconds.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 0
DEMO ?= demo
# Idle OpenMP threads sleep instead of spinning: five times faster when the cores are shared.
export OMP_WAIT_POLICY = PASSIVE
export DAGSTER_DISABLE_TELEMETRY = yes

BIN = .venv/bin
READY = .venv/.ready
# The demo's settings hold over what the shell exports for another deployment.
WITH_DEMO = $(BIN)/dotenv -f $(DEMO)/settings.env run --override --

.PHONY: help install demo ui serve test test-browser lint format audit docs bench clean

help:
	@echo "make demo [SEED=7]   the whole pipeline on the embedded planet, some minutes; then open demo/report.html"
	@echo "make ui              the Dagster UI on what the demo made"
	@echo "make serve           the search page on what the demo made"
	@echo "make test            the tests;  make test-browser: UI and search page in a headless Chromium"
	@echo "make lint | format   ruff and mypy; lint also checks that dependencies are the pinned ones"
	@echo "make audit           known vulnerabilities of the pinned dependencies (asks the advisories' database)"
	@echo "make docs            the documentation, build/site/index.html"
	@echo "make bench           every benchmark, a table each (results in benchmarks/results/)"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/graft demo --seed $(SEED) --folder $(DEMO)

ui: $(READY)
	@test -f $(DEMO)/settings.env || (echo "No demo here yet: run make demo first." && exit 2)
	GRAFT_ENV_FILE=$(abspath $(DEMO))/settings.env DAGSTER_HOME=$(abspath $(DEMO))/dagster_home \
		$(WITH_DEMO) $(BIN)/dagster dev -w workspace.yaml

serve: $(READY)
	@test -f $(DEMO)/settings.env || (echo "No demo here yet: run make demo first." && exit 2)
	GRAFT_ENV_FILE=$(abspath $(DEMO))/settings.env $(WITH_DEMO) $(BIN)/graft serve

test: $(READY)
	$(BIN)/python -m pytest -m "not browser" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-browser: $(READY)
	$(BIN)/python -m pytest -m browser $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check --disable-pip-version-check
	$(BIN)/python deploy/check_pins.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In an environment of its own: what audits is not part of what is audited.
.venv/audit/bin/pip-audit: $(READY)
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit

audit: .venv/audit/bin/pip-audit
	.venv/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[docs]"
	@touch .venv/.docs

docs: .venv/.docs
	$(BIN)/python docs/write_reference.py
	$(BIN)/zensical build --strict --clean

bench: $(READY)
	@mkdir -p benchmarks/results
	@set -e; for script in benchmarks/[a-z]*.py; do \
		echo "== $$script"; $(BIN)/python $$script --json benchmarks/results/$$(basename $$script .py).json; done

clean:
	rm -rf .venv $(DEMO) build *.egg-info
