# Each target does its own set-up in a clean clone: virtual environment, packages, runsc and the warmed template.
PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3))
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := --constraint constraints.txt

.PHONY: demo chat test soak bench lint setup postgres chromium clean

demo: setup  ## A conversation whose sandbox sleeps between two processes
	@$(BIN)/python examples/conversation.py

chat: setup  ## The same with a real chat model, where the environment has a key for one
	@$(BIN)/python examples/chat.py

test: setup postgres chromium  ## All tests, against the real engine; ARGS='-k name' passes options to pytest
	@$(BIN)/python -m pytest --cov --cov-report=term $(ARGS); code=$$?; echo $$code >$(VENV)/pytest-exit-code; exit $$code

soak: setup postgres  ## The tests that take minutes
	@$(BIN)/python -m pytest -m soak $(ARGS)

bench: setup  ## Times beside bare runsc, a bare host, bare httpx and the vendor's client; TRACES=DIR adds the pause policies
	@$(BIN)/python -m benchmarks.engine
	@$(BIN)/python -m benchmarks.cold
	@$(BIN)/python -m benchmarks.crowd
	@$(BIN)/python -m benchmarks.traffic
	@$(BIN)/python -m benchmarks.client
	@$(BIN)/python -m benchmarks.sessions
	@$(BIN)/python -m benchmarks.tools
	@if [ -n '$(TRACES)' ]; then $(BIN)/python -m benchmarks.pause --traces '$(TRACES)'; fi

lint: $(VENV)/packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

setup: $(VENV)/packages
	@$(BIN)/sandbox-tools setup

# Bindings that many hosts share are tested against a real server, which the tests start and stop by themselves.
postgres:
	@if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo 'Installing Postgres for the tests ...'; \
			apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install postgresql >/dev/null; \
		else \
			echo 'Postgres is not installed, so its tests are skipped. Install it: apt-get install postgresql'; \
		fi; \
	fi

# The chatbot of the examples is tested in a real browser.
chromium:
	@if ! command -v chromium >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo 'Installing Chromium for the tests ...'; \
			apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install chromium >/dev/null; \
		else \
			echo 'Chromium is not installed, so its test is skipped. Install it: apt-get install chromium'; \
		fi; \
	fi

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*

# pip of Python 3.11 knows no dependency groups yet, hence the newer one first.
$(VENV)/packages: pyproject.toml constraints.txt | $(VENV)/made
	@echo "Installing Python packages ..."
	@$(PIP) install --quiet $(CONSTRAINTS) pip
	@$(PIP) install --quiet $(CONSTRAINTS) --editable '.[local,langchain]' --group test --group lint
	@touch $@

$(VENV)/made:
	@test -n '$(PYTHON)' || { echo 'No python3 here. Install Python 3.11 or newer.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is older than 3.11. Name a newer one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory venv-module
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Debian keeps venv in a package of its own.
.PHONY: venv-module
venv-module:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install python3-venv >/dev/null; \
	else \
		echo '$(PYTHON) has no venv module. Install it: apt-get install python3-venv' >&2; exit 1; \
	fi
