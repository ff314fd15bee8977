# make demo    from nothing to a model that learned, on the embedded model
# make test    the tests (make test-long: the long ones)          make lint    ruff          make clean    caches and demo_run
# make test-baseline   the PyTorch baseline against MLX and TRL (installs PyTorch)
# make compare         both on the digits task, five seeds: docs/comparison.md
# make real            SFT, reward model and PPO on SmolLM2-135M-Instruct, three seeds (3 hours; installs PyTorch)
# make bench           every benchmark, against pinned peers (Python 3.11 or 3.12; 20 minutes)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

BASELINE := .venv-baseline
BENCH := .venv-bench
BENCH_MLX := .venv-bench-mlx
# Test processes side by side; each takes one core.
PARALLEL := -n 2 --dist worksteal

.PHONY: setup setup-dev demo test test-long test-baseline compare real bench lint clean

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
	$(PY) -m pytest -q -m "not long" $(PARALLEL)

test-long: setup-dev
	$(PY) -m pytest -q -m long $(PARALLEL)

$(BASELINE)/.installed: requirements-dev.txt pytorch_baseline/requirements.txt
	@test -x $(BASELINE)/bin/python || { echo "making $(BASELINE)"; $(PYTHON) -m venv $(BASELINE); }
	@echo "installing PyTorch and its peers into $(BASELINE)"
	@$(BASELINE)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		-r pytorch_baseline/requirements.txt -r requirements-dev.txt
	@touch $@

test-baseline: $(BASELINE)/.installed
	$(BASELINE)/bin/python -m pytest -q -m "not long" $(PARALLEL) tests/baseline tests/rewards/test_encoder_reward.py \
		tests/models/test_interop.py tests/publishing/test_fuse_soft_prompt.py \
		tests/data/test_digits_model.py

compare: setup-dev $(BASELINE)/.installed
	$(PY) benchmarks/compare.py

real: setup $(BASELINE)/.installed
	@$(PY) benchmarks/real_model.py

$(BENCH)/.installed: benchmarks/requirements-trl.txt
	@test -x $(BENCH)/bin/python || { echo "making $(BENCH)"; $(PYTHON) -m venv $(BENCH); }
	@echo "installing TRL 0.11.4 and what it needs into $(BENCH)"
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		-r benchmarks/requirements-trl.txt
	@touch $@

$(BENCH_MLX)/.installed: requirements.txt benchmarks/requirements-mlx.txt
	@test -x $(BENCH_MLX)/bin/python || \
		{ echo "making $(BENCH_MLX)"; $(PYTHON) -m venv $(BENCH_MLX); }
	@echo "installing mlx-lm, pinned, into $(BENCH_MLX)"
	@$(BENCH_MLX)/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		-r benchmarks/requirements-mlx.txt
	@sh install_blas.sh
	@touch $@

bench: $(BENCH)/.installed $(BENCH_MLX)/.installed
	@$(BENCH_MLX)/bin/python benchmarks/bench.py

lint: setup-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf demo_run .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
