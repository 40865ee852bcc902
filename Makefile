# Everything a person or the CI does with this checkout. Needs Python 3.11 or newer with
# its headers, gcc and make; the rest goes into .venv, once, from requirements-dev.lock.

# The first Python that is new enough; `make PYTHON=…` names another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PY     := .venv/bin/python
# The compiled parser, under the name this Python looks for.
PARSER := gateway/_parser$(if $(PYTHON),$(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'))
NODE   := tests/integration/node/node_modules/.ready
# Pytest's own words; `make test PYTEST_ARGS="-k relay"` adds some.
PYTEST := $(PY) -m pytest -q -p no:benchmark

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo check test test-long torture mutants fuzz bench build lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup: .venv/.ready $(PARSER) ## .venv with everything in it, the parser compiled in place

demo: setup ## takes one mail, shows its JSON, stays up for yours (ONCE=1: ends by itself)
	@$(PY) -m gateway demo $(if $(ONCE),--once)

check: setup ## format, lint, types, the stub against the compiled parser
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest gateway._parser

test: check node ## check, then every test that is not marked long
	$(PYTEST) -n 2 -m "not long" $(PYTEST_ARGS)

test-long: setup node ## the tests that take minutes (kill -9 under load, large corpora)
	$(PYTEST) -m long $(PYTEST_ARGS)

# STATES, KILLS and DAMAGES make it shorter, GATEWAY_SEED repeats it.
torture: setup ## hours: a million power cuts, 1,000 kill -9, 10,000 damages (STATES=100000: fewer; goes on where it was stopped)
	$(PY) -m tests.crash.torture power --states $(or $(STATES),1000000) $(if $(GATEWAY_SEED),--seed $(GATEWAY_SEED))
	GATEWAY_DAMAGE=$(or $(DAMAGES),10000) $(PYTEST) -s -m long tests/crash/test_damage.py
	GATEWAY_KILLS=$(or $(KILLS),1000) $(PYTEST) -s -m long tests/crash/test_kill.py

mutants: setup ## breaks the product a dozen ways and shows which test catches it (MUTANTS="a1 g": only these)
	$(PY) -m tests.mutants $(MUTANTS)

fuzz: setup ## the parser and both sessions under sanitizers (FUZZ="receiver server", FUZZ_SECONDS=60, FUZZ_RUNS=, FUZZ_KEEP=)
	$(PY) -m tests.fuzz $(FUZZ) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS)) $(if $(FUZZ_RUNS),--runs $(FUZZ_RUNS)) $(if $(FUZZ_KEEP),--keep)

bench: setup ## the end-to-end measurements of bench/README.md
	$(PY) -m bench $(BENCH_ARGS)

build: setup ## sdist and wheel in dist/
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist .

lock: ## requirements-dev.lock anew: newest versions that fit, with hashes, for every platform
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -qq uv
	build/lock/bin/uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
		--custom-compile-command "make lock" -q -o requirements-dev.lock pyproject.toml requirements-dev.in

clean: ## back to a fresh clone
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	rm -rf tests/integration/node/node_modules gateway/_parser*.so gateway/_parser.c gateway/_parser.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed from the lock alone; the project itself goes in as a link to this folder, which
# gives .venv/bin/gateway and compiles the parser in place.
.venv/.ready: requirements-dev.lock pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up .venv (once) …"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(PARSER): gateway/_parser.pyx setup.py | .venv/.ready
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# Nodemailer is one of the clients the integration tests drive; without npm they are skipped.
.PHONY: node
node:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NODE); else echo "npm is not here: the nodemailer tests will be skipped"; fi

$(NODE): tests/integration/node/package-lock.json
	@cd tests/integration/node && npm ci --silent --ignore-scripts --no-audit --no-fund
	@touch $@
