# Two commands do everything on a fresh machine with Python >= 3.11 and make:
#   make quickstart   environment, real cells, a pretrained and probed checkpoint, a report
#   make test         the test suite (make test-smokes: every config's :smoke; make test-slow: every file of the development data, where it is;
#                     make test-parity: against the PyTorch originals, which it installs;
#                     make test-pods: every system on every layout of eight virtual devices;
#                     make test-faults: killed a hundred times, and on a Slurm of two nodes)
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/quickstart
BIN    := $(VENV)/bin

.PHONY: quickstart env test test-smokes test-slow test-parity test-pods test-faults lint clean

quickstart: env
	PYTHON=$(BIN)/python RUN=$(RUN) bash tools/quickstart.sh

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scjax needs Python 3.11 or later, this is %s (set PYTHON=)" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[eval,tensorboard]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# scGPT asks for packages that no longer install together; its one module that is needed wants none of them
$(VENV)/.parity: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[parity]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps scgpt==0.2.4
	@touch $@

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not (slow or gpu or parity or full or pods or faults or slurm or smokes)"

test-smokes: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "smokes and not full"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "slow and not gpu"

test-pods: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "pods and not full"

test-faults: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "(faults or slurm) and not full"

test-parity: $(VENV)/.parity
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "parity and not full"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
