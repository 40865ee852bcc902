# Everything a person or the CI does with this checkout. Needs Python 3.11 or newer with
# its headers, gcc and make; the rest goes into .venv, once, from requirements-dev.lock.

# The first Python that is new enough; `make PYTHON=…` names another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PY     := .venv/bin/python
# What setup.py compiles. With GATEWAY_PURE=1 only the Cython files are, and the rules run as they stand: quicker
# where a file of theirs is changed all the time.
PYX    := gateway/_parser.pyx gateway/tools/_sink.pyx gateway/tools/_wire.pyx
RULES  := $(patsubst %,gateway/%.py,$(shell sed -n '/^RULES = /,/^"""/{/"""/d;p}' setup.py))
BUILT  := build/.$(if $(GATEWAY_PURE),pure,compiled)
NODE   := tests/integration/node/node_modules/.ready
# Pytest's own words; `make test PYTEST_ARGS="-k relay"` adds some.
PYTEST := $(PY) -m pytest -q -p no:benchmark

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo check test test-long torture mutants fuzz bench bench-peers count scale build lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

setup: .venv/.ready $(BUILT) ## .venv with everything in it, parser and rules compiled in place (GATEWAY_PURE=1: the parser alone)

demo: setup ## takes one mail, shows its JSON, stays up for yours (ONCE=1: ends by itself)
	@$(PY) -m gateway demo $(if $(ONCE),--once)

check: setup ## format, lint, types, the stubs against the compiled modules, whether each mutant still has its place
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest gateway._parser gateway.tools._sink gateway.tools._wire
	$(PY) -m tests.mutants --fit

test: check node ## check, then every test that is not marked long
	$(PYTEST) -n 2 -m "not long" $(PYTEST_ARGS)

test-long: setup node ## the tests that take minutes (kill -9 under load, large corpora)
	$(PYTEST) -m long $(PYTEST_ARGS)

# Each part ends with a line of figures. GATEWAY_SEED repeats the draws of a run.
torture: setup ## hours: a million power cuts, 10,000 damages, 1,000 kill -9 (ONLY=kills, STATES=, DAMAGES=, KILLS=; goes on where it was stopped)
	$(PY) -m tests.crash.torture $(ONLY) --states $(or $(STATES),1000000) --damages $(or $(DAMAGES),10000) --kills $(or $(KILLS),1000) \
		$(if $(GATEWAY_SEED),--seed $(GATEWAY_SEED))

mutants: setup ## breaks the product a dozen ways and shows which test catches it (MUTANTS="a1 g": only these)
	$(PY) -m tests.mutants $(MUTANTS)

fuzz: setup ## the parser and both sessions under sanitizers (FUZZ="receiver server", FUZZ_SECONDS=60, FUZZ_RUNS=, FUZZ_KEEP=)
	$(PY) -m tests.fuzz $(FUZZ) $(if $(FUZZ_SECONDS),--seconds $(FUZZ_SECONDS)) $(if $(FUZZ_RUNS),--runs $(FUZZ_RUNS)) $(if $(FUZZ_KEEP),--keep)

# Runs are saved in .benchmarks, which git does not see; a table then has a row for now and one for the last run.
bench: setup ## the parsers as pytest-benchmark suites, beside the last saved run (BENCH_ARGS="-k content")
	$(PY) -m pytest -q -W default::pytest_benchmark.logger.PytestBenchmarkWarning bench --benchmark-autosave --benchmark-max-time=0.2 --benchmark-columns=median,iqr,min,rounds --benchmark-sort=name \
		$(if $(wildcard .benchmarks/*/*.json),--benchmark-compare) $(BENCH_ARGS)

# What apt has (Postfix, Node) is taken as it is found.
bench-peers: setup ## the gateway beside other servers, 20 minutes, into bench/RESULTS.md (PEERS_ARGS="--only relay/1KiB")
	$(PY) -m bench.end_to_end --install $(PEERS_ARGS)

count: setup ## instructions of the hot paths against bench/budgets.toml (needs valgrind; COUNT_ARGS="--save --reason …" renews them)
	$(PY) -m bench.count $(COUNT_ARGS)

scale: setup ## how the cost of a message grows with connections, recipients, size, queue, workers (SCALE_ARGS="--html scale.html")
	$(PY) -m bench.scale $(SCALE_ARGS)

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
	rm -rf tests/integration/node/node_modules gateway/_parser.c gateway/_parser.html gateway/tools/_*.c
	find gateway -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed from the lock alone; the project itself goes in as a link to this folder, which
# gives .venv/bin/gateway. What is compiled is compiled below.
.venv/.ready: requirements-dev.lock pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "setting up .venv (once) …"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@GATEWAY_PURE=1 $(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(BUILT): $(PYX) $(wildcard gateway/tools/*.pxd) setup.py $(RULES) | .venv/.ready
	@mkdir -p build && rm -f build/.pure build/.compiled
	@echo "compiling …"
	@GATEWAY_PURE=$(GATEWAY_PURE) $(PY) setup.py -q build_ext --inplace >build/compiled.log 2>&1 || { cat build/compiled.log; exit 1; }
	@touch $@

# Nodemailer is one of the clients the integration tests drive, smtp-server a peer of the bench; without npm these tests are skipped.
.PHONY: node
node:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NODE); else echo "npm is not here: the tests with Node will be skipped"; fi

$(NODE): tests/integration/node/package-lock.json
	@cd tests/integration/node && npm ci --silent --ignore-scripts --no-audit --no-fund
	@touch $@
