PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := results/demo/1234

export MPLBACKEND ?= Agg

.PHONY: demo test test-slow check bench clean

# made again only when the requirements change
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $(INSTALLED)

$(INSTALLED)-dev: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[dev,asteroid,demo]'
	touch $(INSTALLED)-dev

demo: $(INSTALLED)
	$(BIN)/python recipes/train.py hparams/demo.yaml
	$(BIN)/python benchmarks/demo_example.py $(DEMO)
	$(BIN)/trackformer separate $(DEMO)/example/mix.wav \
		--model $(DEMO)/separator --out $(DEMO)/example
	$(BIN)/python benchmarks/demo_report.py $(DEMO)

test: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: $(INSTALLED)-dev
	$(BIN)/python -m pytest -q -m slow

bench: $(INSTALLED)-dev
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/mixit_loss.py
	$(BIN)/python benchmarks/favor.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/ddp_scaling.py
	$(BIN)/python benchmarks/data_loading.py

check: $(INSTALLED)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint -d relaxed hparams examples
	$(BIN)/codespell

clean:
	rm -rf $(VENV) results
