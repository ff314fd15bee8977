# make demo    from nothing to a model that learned, on the embedded model
# make test    the tests          make lint    ruff          make clean    caches and demo_run
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: setup setup-dev demo test lint clean

setup: $(VENV)/.installed

# --prefer-binary: a wheel one version older beats a compiler run.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing requirements.txt into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --prefer-binary -r requirements.txt
	@sh install_blas.sh
	@touch $@

setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --prefer-binary -r requirements-dev.txt
	@touch $@

demo: setup
	@$(PY) benchmarks/demo.py

test: setup-dev
	$(PY) -m pytest -q

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf demo_run .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
