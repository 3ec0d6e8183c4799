# make demo: the main job on real data.   make test: all tests but slow and gpu.
# Both create .venv on first use; PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: env demo test slow gpu lint clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" --config-settings editable_mode=strict
	touch $@

demo: $(STAMP)
	$(BIN)/python tutorials/demo.py

# Doctests run on the installed package, where guides and models stand inside pyro_nf.
test: $(STAMP)
	$(BIN)/pytest -m "not slow and not gpu" tests
	$(BIN)/pytest --doctest-modules --pyargs pyro_nf

slow: $(STAMP)
	$(BIN)/pytest -m slow tests

gpu: $(STAMP)
	$(BIN)/pytest -m gpu tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml --package pyro_nf

clean:
	rm -rf $(VENV) build demo *.egg-info
