VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

# Train on real digits, save, load in a fresh process, draw pictures. DEMO="--steps 200" makes it short.
demo: $(VENV)/.train
	$(BIN)/python training/demo.py --overwrite $(DEMO)

# Two processes of one thread each: more threads than cores slow PyTorch down many times. TEST="-n 8" where there are more.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --benchmark-disable $(TEST)

lint: $(VENV)/.test $(VENV)/.lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Ratios against the stock scheduler and pipeline of diffusers, on this machine.
bench: $(VENV)/.test
	DDIM_BENCH_ROUNDS=15 $(BIN)/python -m pytest tests/benchmarks -q --benchmark-columns=median,iqr,rounds

clean:
	rm -rf $(VENV) out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras, made again when the dependencies change.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
