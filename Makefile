# Everything a newcomer needs: `make demo`, `make test`. Only python3 (>= 3.11), its venv module and a
# C++ compiler must be there. The first run makes .venv; later runs reinstall only what changed.
#
#   make test LDDYN_TORCH="torch==2.11.0"    another torch than the one in constraints.txt
#   make test PYTHON=python3.12              another Python
#   LDDYN_CUDA=0 make test                   no CUDA kernels, even where nvcc is found

# Where `make bench` puts its section "ops": benchmarks/results/NAME.json for the tables of the docs.
RESULTS ?= .benchmarks/results.json
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	&& echo $$p && break; done)
PINNED := $(shell grep '^torch==' constraints.txt)
LDDYN_TORCH ?= $(PINNED)
BIN := .venv/bin
STAMP := .venv/$(subst =,-,$(LDDYN_TORCH))
# Another torch brings its own triton.
FREED := $(if $(filter $(PINNED),$(LDDYN_TORCH)),^torch==,^torch==|^triton==)
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test cases torture matrix docs lint lint-ruff lint-format lint-types lint-csrc bench peers gpu-check format clean

demo: .venv/installed
	$(BIN)/lddyn demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q

# The kinds of rows, models and trainers that people hold, as a table: which come out right.
cases: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -q -m case --disable-warnings

# What docs/reliability.md promises, tried thousands of times: an hour or two. It goes on where it
# stopped, from the counts in .benchmarks/torture.json, and writes the page's table.
torture: export PYTHONPATH = .:tests:tests/engine
torture: .venv/installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/torture.py $(if $(ONLY),--only $(ONLY))
	$(BIN)/python benchmarks/torture.py --docs

# Other versions of Python, torch, transformers and TRL (docs/versions.md); gigabytes a row.
matrix:
	python3 tests/matrix.py $(if $(ROWS),--only $(ROWS))

# The pages, in docs/_build. A warning is an error; what is not found in lddyn is one, too.
docs: .venv/installed
	$(BIN)/sphinx-build -q -n -W --keep-going docs docs/_build

lint: lint-ruff lint-format lint-types lint-csrc

lint-ruff: .venv/installed
	$(BIN)/ruff check .

lint-format: .venv/installed
	$(BIN)/ruff format --check .

lint-types: .venv/installed
	$(BIN)/mypy

lint-csrc: .venv/installed
	$(BIN)/clang-format --dry-run --Werror csrc/*

bench: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest benchmarks --benchmark-json=.benchmarks/latest.json
	$(BIN)/python benchmarks/record.py .benchmarks/latest.json $(RESULTS)

# The libraries of docs/peers.md, in three environments. LogIX needs Python 3.10 and is left out where
# there is none. torchvision and torchaudio may come built for another torch, and then no model loads.
PYTHON310 ?= $(shell command -v python3.10)
PEERS := peers bergson $(if $(PYTHON310),logix)
peers: .venv/installed $(PEERS:%=.venv-%/installed)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py --out benchmarks/results/peers.json \
		$(foreach p,$(PEERS),--python $(p)=$(CURDIR)/.venv-$(p)/bin/python)

.venv-peers/installed: benchmarks/peers-requirements.txt
.venv-bergson/installed: benchmarks/peers-requirements-bergson.txt
.venv-logix/installed: benchmarks/peers-requirements-logix.txt
.venv-logix/installed: PYTHON = $(PYTHON310)
.venv-peers/installed .venv-bergson/installed .venv-logix/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -q "$(PINNED)"
	$(@D)/bin/pip install --disable-pip-version-check -q "$(PINNED)" -r $<
	$(@D)/bin/pip uninstall -q -y torchvision torchaudio
	touch $@

# Needs torch, triton, pybind11, ninja and nvcc; makes no virtual environment, fetches nothing.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

clean:
	rm -rf .venv build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first: then nothing below can bring another one (a CUDA torch is 2.6 GB).
$(STAMP):
	@test -n "$(PYTHON)" || { echo "lddyn needs Python 3.11 or later: none found on PATH" \
		"(set PYTHON=/path/to/python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lddyn needs Python 3.11 or later, $(PYTHON) is older"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q "$(LDDYN_TORCH)"
	rm -f .venv/torch-* && touch "$@"

.venv/constraints.txt: constraints.txt $(STAMP)
	{ grep -vE '$(FREED)' constraints.txt; echo "$(LDDYN_TORCH)"; } > $@

.venv/installed: $(SOURCES) .venv/constraints.txt
	$(BIN)/pip install --disable-pip-version-check -q -c .venv/constraints.txt -e ".[test,dev,docs]"
	touch $@
