# make train      install what it takes, then train a small Llama with LinUpper on this machine
# make test       install what it takes, then run every test
# make quick      what starts no process, takes less than half a second, and needs no other trainer
# make mutants    break one line at a time and see which test notices
# make lint       ruff and pyrefly, both quiet
# make evidence   does it help? two experiments with regression, and a language model in ten minutes
# make evidence-long DATA=FOLDER TOKENIZER=FOLDER   the same in the proportions of the papers: a day
# make bench      what the weighting costs, of the loss and of a whole step, against torchtitan's own
# make docs       the site in docs/_build, strictly: a dead link between pages fails
# make dist       sdist and wheel, checked, with their hashes; the same bytes from the same commit
# make audit      known vulnerabilities of what is locked; asks a service on the network
# make lock       the lock anew from pyproject.toml; keeps versions that still fit, takes none younger
#                 than a week; to move on: make lock NEWER='--upgrade-package click', or --upgrade

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LOCK   := .ci/requirements.txt
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --no-deps

.PHONY: train test quick mutants lint evidence evidence-long bench docs dist audit lock clean

train: $(STAMP)
	$(BIN)/weighting train linupper --checkpoint.enable --weighting.record every=1

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not processes and not slow" \
	  --ignore=tests/weighting/integrations

mutants: $(STAMP)
	nice $(BIN)/python benchmarks/mutants.py

lint: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyrefly check --summary=none

evidence-long: $(STAMP)
	$(BIN)/python benchmarks/evidence_long.py --data $(DATA) $(if $(TOKENIZER),--tokenizer $(TOKENIZER))

evidence: $(STAMP)
	$(BIN)/python benchmarks/regression.py
	$(BIN)/python benchmarks/theory.py
	$(BIN)/python benchmarks/evidence.py --budget-minutes 10

bench: $(STAMP)
	$(BIN)/python benchmarks/loss_path.py
	$(BIN)/python benchmarks/overhead.py

docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -n docs docs/_build

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pip hash dist/*

# Without --strict, a package that the service does not know would pass.
audit: $(STAMP)
	$(BIN)/pip-audit --requirement $(LOCK) --require-hashes --disable-pip --strict

lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --generate-hashes --only-binary :all: --exclude-newer '7 days' $(NEWER) \
	  --custom-compile-command 'make lock' --quiet --output-file $(LOCK)

clean:
	rm -rf $(VENV) build dist outputs docs/_build

# Reinstalled only when what is installed changes; the sources themselves are used in place.
# Every package comes by its hash and as a wheel, so that no build fetches something unlocked.
$(STAMP): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; pass one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once: torch, torchtitan and what they need."
	@echo "About 3 GB to fetch and 7 GB on disk; pip says which file it is at, and how large that is."
	@$(PIP) --require-hashes --only-binary :all: --requirement $(LOCK) || { \
	  echo "$(LOCK) holds for Python 3.11 to 3.14 on Linux; elsewhere, without the lock:"; \
	  echo "  $(BIN)/python -m pip install -e '.[titan,plot,evaluate,tune,dev]' && touch $@"; exit 1; }
	@$(PIP) --quiet --no-build-isolation --no-index --editable .
	@touch $@
