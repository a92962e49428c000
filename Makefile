# make train      install what it takes, then train a small Llama with LinUpper on this machine
# make test       install what it takes, then run every test
# make lint       ruff and pyrefly, both quiet
# make evidence   does it help? two experiments with regression, and a language model in ten minutes
# make bench      what the weighting costs, of the loss and of a whole step, against torchtitan's own

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: train test lint evidence bench clean

train: $(STAMP)
	$(BIN)/weighting train specs/linupper.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyrefly check --summary=none

evidence: $(STAMP)
	$(BIN)/python benchmarks/regression.py
	$(BIN)/python benchmarks/theory.py
	$(BIN)/python benchmarks/evidence.py --budget-minutes 10

bench: $(STAMP)
	$(BIN)/python benchmarks/loss_path.py
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) build dist outputs

# Reinstalled only when what is installed changes; the sources themselves are used in place.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; pass one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): torch and torchtitan, about 6 GB, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.15.0 -e '.[titan,plot,dev]'
	@touch $@
