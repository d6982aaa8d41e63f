# At most ten recipes; each can be typed in a fresh clone.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
# what `make test` needs, which is small, and all that there is
EXTRAS := tvm,openvino,pt2e,flows,trust,examples,dev
LARGE := executorch,litert,coreml,stablehlo,tvm-cuda,s3-tests,lint
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint format clean lock

demo: .venv/ready  ## checkpoint to release on real data, from nothing
	@$(BIN)/python -m flows.demo

test: lint  ## lint, types, import layers and every test
	$(BIN)/pytest --numprocesses auto --dist loadfile

test-all: .venv/all lint  ## as test, with every backend that there is; no test may be skipped for want of a package
	EXPORTYARD_TEST_ALL=1 $(BIN)/pytest --numprocesses auto --dist loadfile

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and alone: an index may hold several builds of it, and only this version is wanted
.venv/ready: requirements.lock pyproject.toml
	@echo "creating .venv from requirements.lock (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "exportyard needs Python 3.11 or later: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --editable .
	@$(BIN)/python -m compileall -q pipeline flows || true
	@touch $@

.venv/all: requirements-all.lock .venv/ready
	@echo "installing requirements-all.lock into .venv (2 GB)"
	@$(BIN)/pip install --quiet --requirement requirements-all.lock
	@$(BIN)/exportyard setup litert
	@touch $@

lock:  ## refresh both lock files from the newest versions that pyproject.toml admits
	$(PYTHON) -m venv --clear .scratch/lock
	.scratch/lock/bin/pip install --quiet --editable '.[$(EXTRAS)]'
	(echo '# Exact versions of everything, for Python 3.11; written by `make lock`, read by `make .venv`.'; \
	 .scratch/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//') > requirements.lock
	.scratch/lock/bin/pip install --quiet --constraint requirements.lock --editable '.[$(EXTRAS),$(LARGE)]'
	(echo '# What the large backends need beside requirements.lock; written by `make lock`, read by `make test-all`.'; \
	 echo '--requirement requirements.lock'; \
	 .scratch/lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' | grep --invert-match --line-regexp \
	 --fixed-strings --file requirements.lock) > requirements-all.lock

clean:
	rm -rf .venv .scratch artifacts/*/ .mypy_cache .ruff_cache .pytest_cache
