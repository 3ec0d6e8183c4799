# make demo: the main job on real data.   make test: all tests but slow and gpu.   make docs: the site, in build/docs.
# Both create .venv on first use; PYTHON names the interpreter to make it with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: env demo test notebooks tutorials docs links slow gpu lint clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]" --config-settings editable_mode=strict
	touch $@

demo: $(STAMP)
	$(BIN)/python tutorials/demo.py

# Doctests run on the installed package, where guides and models stand inside pyro_nf.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow and not gpu" tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --doctest-modules --pyargs pyro_nf

# Every cell of the tutorials, with fits of a few steps, one thread a notebook.
notebooks: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONSTARTUP=$(CURDIR)/tests/few_steps.py $(BIN)/pytest -n auto --nbmake tutorials

# The tutorials' notebooks from their sources, run in earnest: some minutes.
tutorials: $(STAMP)
	cd tutorials && ../$(BIN)/jupytext --quiet --to ipynb [0-9]_*.py
	cd tutorials && ../$(BIN)/jupyter execute --inplace --timeout=1800 [0-9]_*.ipynb

docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

# Asks every site that the pages link to: needs a network.
links: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -b linkcheck docs build/links

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
