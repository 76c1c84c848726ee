PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS ?= 2
export MPLBACKEND ?= Agg

.PHONY: demo test test-slow check bench clean

# one installation with the development and Asteroid extras; made again only
# when the requirements change
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev,asteroid]'
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python recipes/train.py hparams/demo.yaml
	$(BIN)/trackformer separate results/demo/1234/example/mix.wav \
		--model results/demo/1234/separator --out results/demo/1234/example
	$(BIN)/python benchmarks/demo_report.py results/demo/1234

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint -d relaxed hparams
	$(BIN)/codespell

clean:
	rm -rf $(VENV) results
