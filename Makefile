# At most ten recipes; each can be typed in a fresh clone.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format clean lock

demo: .venv/ready  ## checkpoint to release on real data, from nothing
	@$(BIN)/python -m flows.demo

test: lint  ## lint, types, import layers and every test
	$(BIN)/pytest --numprocesses auto --dist loadfile

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

lock: .venv/ready  ## refresh requirements.lock from the newest versions that pyproject.toml admits
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[tvm,flows,examples,dev]'
	(echo '# Exact versions of everything, for Python 3.11; written by `make lock`, read by `make .venv`.'; \
	 $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//') > requirements.lock

clean:
	rm -rf .venv .scratch artifacts/*/ .mypy_cache .ruff_cache .pytest_cache
