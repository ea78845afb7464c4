# make demo and make test install what they need into .venv, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A torch that is there already (a GPU machine's own) is used as it is.
SITE := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)

CLIENT_VENVS := .venvs
CLIENTS := $(basename $(notdir $(wildcard tests/clients/requirements/*.txt)))

.PHONY: demo test test-clients check bench clean

demo: $(VENV)/.installed
	$(BIN)/rollout-ft demo $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

# Every client library in an environment of its own, made once: a minute or two each.
test-clients: $(VENV)/.installed $(CLIENTS:%=$(CLIENT_VENVS)/%/.installed)
	$(BIN)/python -m pytest tests/clients $(ARGS)

$(CLIENT_VENVS)/%/.installed: tests/clients/requirements/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: $(VENV)/.installed
	$(BIN)/rollout-ft bench overhead $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(SITE) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENT_VENVS) .pytest_cache .ruff_cache .hypothesis
