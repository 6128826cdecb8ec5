# make workbook   set up .venv and execute every notebook; the executed copies go to build/notebooks/
# make test       set up .venv and run the checks and the tests
# make screenshots  pictures of four notebooks as a browser shows them, in build/screenshots/
# make test-trt-next  repeat the engine tests under the next TensorRT-RTX, in an environment of its own
# make lab        open the notebooks in JupyterLab
# MODEL=models/chatglm_6b chooses another checkpoint for all of them; PYTHON=python3.12 another interpreter.
MODEL ?= models/chatglm_tiny
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export GLMTRT_MODEL := $(MODEL)

.PHONY: workbook test lint lab screenshots test-trt-next clean

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

screenshots: $(INSTALLED)
	$(BIN)/glmtrt workbook --model $(MODEL) --output build/notebooks
	$(BIN)/python tests/screenshots.py build/screenshots

# The pins of constraints.txt but for TensorRT-RTX; nothing but the tests that build and refuse engines.
NEXT_TENSORRT_RTX ?= 1.7.1.116
test-trt-next:
	$(PYTHON) -m venv $(VENV)-trt-next
	sed 's/^tensorrt-rtx==.*/tensorrt-rtx==$(NEXT_TENSORRT_RTX)/' constraints.txt > $(VENV)-trt-next/constraints.txt
	$(VENV)-trt-next/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-trt-next/constraints.txt -e '.[dev]'
	$(VENV)-trt-next/bin/python -m pytest tests/test_packages.py tests/test_parsers.py tests/test_engines.py tests/test_plans.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of constraints.txt, about three minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build models/run
