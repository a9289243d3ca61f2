# make demo       the main job on two CPU cores: train, evaluate, report (runs/demo)
# make test       the fast tests
# make test-all   all tests, slow ones too: what CI runs
# make lint       ruff
# make docs       the site of docs/, in site/; a broken link is an error
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
ARGS ?=

.PHONY: demo test test-all lint docs clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

demo: .venv/.installed
	$(BIN)/python -m router_r1_jax.train --config=configs/demo.py --workdir=$(RUN) $(ARGS)
	$(BIN)/python -m router_r1_jax.evaluate --config=configs/demo.py --workdir=$(RUN) $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest -q -n 2 -m 'not slow'

test-all: .venv/.installed-test
	$(BIN)/python -m pytest -q -n 2

lint: .venv/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: .venv/.installed-docs
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs site
