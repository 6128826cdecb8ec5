# make workbook   set up .venv and execute every notebook; the executed copies go to build/notebooks/
# make test       set up .venv and run the checks and the tests
# make lab        open the notebooks in JupyterLab
# MODEL=models/chatglm_6b chooses another checkpoint for all of them; PYTHON=python3.12 another interpreter.
MODEL ?= models/chatglm_tiny
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export GLMTRT_MODEL := $(MODEL)

.PHONY: workbook test lint lab clean

workbook: $(INSTALLED)
	$(BIN)/glmtrt workbook --model $(MODEL) --output build/notebooks

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(INSTALLED)
	$(BIN)/jupyter trust notebooks/*.ipynb  # or JupyterLab hides the committed pictures until a cell is run
	$(BIN)/jupyter lab notebooks

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of constraints.txt, about a minute ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build models/run
