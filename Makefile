# make workbook          set up .venv and execute every notebook; the executed copies go to build/notebooks/
# make test              set up .venv, run the checks and all tests
# make test STEP=export  the unit tests of one step and its notebook, nothing else
# make test-fast         all tests except those marked notebook, browser or slow
# make fuzz              fuzz the readers of every kind of file, 20,000 inputs each, about six minutes
# make lint              ruff, mypy, and import-linter on the order of the folders
# make screenshots       pictures of four notebooks as a browser shows them, in build/screenshots/
# make test-trt-next     repeat the engine tests with the next TensorRT-RTX, in an environment of its own
# make lab               open the notebooks in JupyterLab
# MODEL=models/chatglm_6b selects another checkpoint for all of them, PYTHON=python3.12 another interpreter.
MODEL ?= models/chatglm_tiny
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# A test process for each core, each with one thread for its matmuls, or they would wait for each other. A file's tests
# go to one process, in the order of tests/conftest.py: groups are lost under pytest 9.2 (pytest-xdist, issue 1386).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
export GLMTRT_MODEL := $(MODEL)

STEPS := core checkpoints inputs sessions patches export graphs quantize engines fast chat bench standin workbook cli
# Steps that have a notebook, and its number.
NOTEBOOKS := checkpoints-00 inputs-01 patches-02 export-03 graphs-04 engines-05 chat-06 fast-07 workbook-08
ifdef STEP
ifneq ($(words $(filter $(STEP),$(STEPS))),1)
$(error There is no step "$(STEP)": choose one of $(STEPS))
endif
NUMBER := $(patsubst $(STEP)-%,%,$(filter $(STEP)-%,$(NOTEBOOKS)))
endif

.PHONY: workbook test test-fast fuzz lint lab screenshots test-trt-next clean

workbook: $(INSTALLED)
	$(BIN)/glmtrt workbook --model $(MODEL) --output build/notebooks

ifdef STEP
test: $(INSTALLED)
	$(PYTEST) tests/$(STEP) $(if $(NUMBER),tests/end_to_end/test_notebooks.py -k "not test_notebooks or $(NUMBER)_")
else
test: lint
	$(PYTEST)
endif

test-fast: $(INSTALLED)
	$(PYTEST) --dist load -m "not notebook and not browser and not slow"

fuzz: $(INSTALLED)
	GLMTRT_FUZZ=fuzz $(PYTEST) tests/fuzz

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lab: $(INSTALLED)
	$(BIN)/jupyter trust notebooks/*.ipynb  # or JupyterLab hides the committed pictures until a cell is run
	# glmtrt_helpers first: the kernels inherit what it sets to stay off the network
	$(BIN)/python -c 'import glmtrt_helpers; from jupyterlab.labapp import main; main()' \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url=None notebooks

screenshots: $(INSTALLED)
	$(BIN)/glmtrt workbook --model $(MODEL) --output build/notebooks
	PYTHONPATH=tests $(BIN)/python -m support.screenshots build/screenshots

# The pins of constraints.txt except TensorRT-RTX's; only the tests that build and refuse engines.
NEXT_TENSORRT_RTX ?= 1.7.1.116
test-trt-next:
	$(PYTHON) -m venv $(VENV)-trt-next
	sed 's/^tensorrt-rtx==.*/tensorrt-rtx==$(NEXT_TENSORRT_RTX)/' constraints.txt > $(VENV)-trt-next/constraints.txt
	$(VENV)-trt-next/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-trt-next/constraints.txt -e '.[dev]'
	$(VENV)-trt-next/bin/python -m pytest tests/core/test_tensorrt_package.py tests/graphs/test_tensorrt_parser.py tests/engines

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: run make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of constraints.txt, about three minutes ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf build models/run
