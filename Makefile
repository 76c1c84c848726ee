PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := results/demo/1234
EXCERPT := results/demo/excerpt

PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --durations=10 -rs
export MPLBACKEND ?= Agg

# exact versions of everything, of what source packages are built with as well
LOCK := requirements.lock
PIP := $(BIN)/python -m pip install --quiet --constraint $(LOCK)
INSTALL := $(PIP) --build-constraint $(LOCK)

.PHONY: demo test test-slow check bench lock clean

# made again only when the requirements change
$(INSTALLED): setup.py $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(INSTALL) -e .
	touch $(INSTALLED)

# Asteroid asks for pesq, which has to be compiled
$(INSTALLED)-dev: $(INSTALLED)
	$(INSTALL) -e '.[dev,demo]'
	@if printf '#include <Python.h>\n' | cc -x c -fsyntax-only -I "$$( \
		$(BIN)/python -c 'import sysconfig as s; print(s.get_path("include"))' \
		)" - 2>/dev/null; then $(INSTALL) -e '.[asteroid]'; \
	else echo 'No C compiler: Asteroid is not installed, its tests are' \
		'skipped. With one: rm $(INSTALLED)-dev; make test'; fi
	touch $(INSTALLED)-dev

demo: $(INSTALLED)
	$(BIN)/trackformer separate examples/waterworks.ogg --figure --out $(EXCERPT)
	$(BIN)/python recipes/train.py hparams/demo.yaml
	$(BIN)/python benchmarks/demo_example.py $(DEMO)
	$(BIN)/trackformer separate $(DEMO)/example/mix.wav \
		--model $(DEMO)/separator --out $(DEMO)/example
	$(BIN)/python benchmarks/demo_report.py $(DEMO) $(EXCERPT)

test: $(INSTALLED)-dev
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(INSTALLED)-dev
	$(PYTEST) -m slow

bench: $(INSTALLED)-dev
	$(INSTALL) -e '.[bench]'
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

# the newest of everything that setup.py admits, beside the tested torch
lock: $(INSTALLED)
	$(BIN)/python -m pip install --quiet uv
	{ printf 'pip\nsetuptools\ntorch=='; $(BIN)/python -c \
		'from trackformer_sb.cli import TESTED; print(TESTED)'; } \
	| $(BIN)/uv pip compile setup.py - --all-extras --universal --upgrade \
		--python-version 3.10 --quiet --no-annotate --no-header \
		--no-emit-index-url --output-file $(LOCK)

clean:
	rm -rf $(VENV) results
