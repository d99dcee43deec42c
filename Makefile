# Two commands matter: `make zero` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: zero test setup lint bench clean

zero: setup
	$(BIN)/liubai zero

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

setup: .venv/ready

# torch first and alone: with its version settled, nothing that follows can pull in another build
.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Liubai needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-peers build *.egg-info

# Liubai beside TRL and transformers (installed into .venv-peers). About ten minutes; wants a quiet machine.
bench: setup
	$(BIN)/python -m bench.peers
	.venv-peers/bin/python -m bench.run --no-tune --rounds 2 --steps 1
