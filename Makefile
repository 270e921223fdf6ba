# Needs make and Python >= 3.11, nothing else: each target first builds the virtual environment that it runs in.
# By default the newest CPython that is there, so that jax and flax are those of today; PYTHON= names another one.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(or $(shell python3 tools/newest.py 3.13 3.12 3.11),python3)
endif
VENV ?= .venv
# What `make lowest` and `make newest` run on: the first that is there.
OLDER ?= 3.11 3.12 3.13
NEWER ?= 3.12 3.13
# Of JAX, for `make flags`. Where JAX_PLATFORMS is not set, the tests set it to cpu.
FLAGS ?= JAX_CHECK_TRACER_LEAKS=1 JAX_DEBUG_NANS=1 JAX_ENABLE_X64=1 JAX_NUMPY_RANK_PROMOTION=raise JAX_DISABLE_JIT=1 \
	JAX_PLATFORMS=

BIN := $(VENV)/bin
# As many processes as the smallest machine has cores; worksteal, because a few tests compile for much longer than the rest.
PYTEST := pytest -n 2 --dist worksteal
# Without those that take whole minutes: `make slow` runs them. And without what is exhaustive, for an answer in minutes.
MOST := -m "not slow"
FEW := -m "not slow and not exhaustive"
# pip says by itself what it is doing; only its advice to upgrade itself is left out.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Half of an installation is bytecode of modules that nothing imports. Of this option of pip `no` is what turns it on.
export PIP_NO_COMPILE := no
# Where `make versions`, `lowest`, `newest` and `flags` store what passed, if anywhere.
export RECORD ?=
NOX := $(BIN)/nox

.DEFAULT_GOAL := help
.PHONY: help demo test slow checked fuzz bench gpu soak mutants types types-once types-mypy types-pyright docs lint readability release audit flags versions lowest newest check clean
.DELETE_ON_ERROR:
# The first line says what the target runs on: an environment that is there keeps the Python that it was made with.
ifneq ($(filter demo test slow checked fuzz bench gpu docs,$(MAKECMDGOALS)),)
$(info python: $(shell $(or $(wildcard $(BIN)/python),$(PYTHON)) -c 'import platform, sys; print(platform.python_version(), "of", sys.base_prefix)'))
endif
# Two installations at once into one environment would break it.
ifndef INSTALLED
.NOTPARALLEL:
endif

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.installed-demo  ## train on handwritten digits
	$(BIN)/python examples/digits.py
	@echo "make demo: done"

test: $(VENV)/.installed-test  ## the tests but for what takes long, and every docstring as one
	$(BIN)/$(PYTEST) $(FEW)
	@echo "make test: all tests passed"

# In CI `make lowest` and `make newest` have run what is exhaustive. By files, since tests of one file share what takes long.
slow: $(VENV)/.installed-test  ## the rest: recipes, every case, whole benchmark runs, several processes, long trainings
	$(BIN)/pytest -n 2 --dist loadfile -m "slow$(if $(CI),, or exhaustive)" tests
	@echo "make slow: all tests passed"

checked: $(VENV)/.installed-test  ## the tests again, every signature checked at run time
	FLAXSPLIT_TYPECHECKER=typeguard $(BIN)/$(PYTEST) $(MOST)
	@echo "make checked: all tests passed"

# One process: a machine's second core is then free for XLA. SECONDS=600 gives each test of test_fuzz so long, and leaves
# out the laws over trees, which end by count alone.
fuzz: $(VENV)/.installed-test  ## the laws over 10,000 drawn models each, or for SECONDS= each
	rm -f build/fuzz.json
	HYPOTHESIS_PROFILE=deep FUZZ_SECONDS=$(or $(SECONDS),inf) FUZZ_REPORT=build/fuzz.json \
		$(BIN)/pytest -s --timeout 0 tests/test_fuzz.py $(if $(SECONDS),,tests/test_laws.py)
	@echo "make fuzz: all laws held"

bench: $(VENV)/.installed-bench  ## every benchmark once, quickly; or as many as MINUTES= hold
	$(BIN)/python -m benchmarks $(if $(MINUTES),--minutes $(MINUTES),--quick) --out build/benchmarks
	$(BIN)/python -m benchmarks report --out build/benchmarks
	@echo "make bench: done"

# Installs nothing: it runs where jax, flax, optax, equinox, jaxtyping, rich, matplotlib and typing_extensions are. A smoke of
# the same claims comes first, so that a missing package shows at once. MINUTES=, OUT= and RESUME=--resume change the run.
gpu:  ## the benchmarks in eight minutes, on the accelerator that is there; installs nothing
	$(PYTHON) -m benchmarks throughput recompilation dispatch scan memory vmap --smoke --minutes 1 --out build/smoke
	$(PYTHON) -m benchmarks --minutes $(or $(MINUTES),8) $(if $(OUT),--out $(OUT)) $(RESUME)
	$(PYTHON) -m benchmarks report $(if $(OUT),--out $(OUT))
	@echo "make gpu: done"

types: types-once  ## mypy and pyright, both strict, and what they, ty and pyrefly must reject; on the oldest Python too
	$(BIN)/python tools/types_table.py
	@python=$$($(PYTHON) tools/newest.py 3.11) || exit; \
	if [ -z "$$python" ]; then echo "types: no CPython 3.11 found, checked with this one"; exit; fi; \
	$(MAKE) --no-print-directory types-once PYTHON="$$python" VENV=$(VENV)-types
	@echo "make types: no errors"

# Each checker takes one core: they run beside each other.
types-once: $(VENV)/.installed-dev $(VENV)/.installed-stubs
	$(MAKE) --no-print-directory -j 2 --output-sync=target INSTALLED=1 types-mypy types-pyright

# stubtest needs no list of exceptions; the overlay's check brings its own.
types-mypy:
	$(BIN)/mypy --strict flaxsplit tests examples benchmarks tools noxfile.py
	$(BIN)/python -m mypy.stubtest flaxsplit --concise --mypy-config-file pyproject.toml

# pyright reads [tool.pyright] for what to check: the same, strictly. With --verifytypes it looks for the package where the
# python on PATH finds it, whatever --pythonpath says.
types-pyright:
	$(BIN)/pyright --pythonpath $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pyright --verifytypes flaxsplit --ignoreexternal
	$(BIN)/python stubs/check

docs: $(VENV)/.installed-docs  ## the site, into build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "make docs: build/site/index.html"

lint: $(VENV)/.installed-lint  ## ruff, and the spelling of every text
	$(BIN)/ruff check
	$(BIN)/codespell
	@echo "make lint: no findings"

readability: $(VENV)/.installed-readable  ## how the pages read: sentence length, passive voice, grade; a report
	$(BIN)/python tools/readability.py

release: $(VENV)/.installed-versions  ## the checklist of a release: texts, build, wheel in an empty environment, README there
	$(BIN)/python tools/release.py
	$(NOX) -s empty
	@echo "make release: tag the commit, and upload what lies in build/dist"

audit: $(VENV)/.installed-audit  ## known vulnerabilities of what is installed, where they can be looked up
	$(BIN)/python tools/audit.py

# One after the other; all of them, also where one fails.
flags: $(VENV)/.installed-test  ## the tests under each of JAX's flags; FLAGS and TESTS choose fewer
	@failed=; for flag in $(FLAGS); do echo "===== $$flag"; \
		env $$flag $(BIN)/$(PYTEST) --junitxml=build/flags.xml $(TESTS) $(if $(RECORD),&& \
		$(BIN)/python tools/record.py "$$flag" build/flags.xml $(RECORD) $(TESTS)) || failed="$$failed $$flag"; done; \
	if [ -n "$$failed" ]; then echo "make flags: failed under$$failed"; exit 1; fi; echo "make flags: passed under each"

# A Python that is not there is an error where it was asked for, else said and left out.
versions: $(VENV)/.installed-versions  ## the built wheel in an empty environment, and the tests on it: each Python, oldest and newest
	$(NOX) $(if $(ONLY),--error,--no-error)-on-missing-interpreters \
		$(if $(ONLY),-s $(patsubst %,'versions(%)',$(ONLY))) $(if $(TESTS),-- $(TESTS))
	@echo "make versions: all tests passed"

lowest: $(VENV)/.installed-versions  ## the tests with the oldest dependencies supported, the overlay's too
	@python=$$($(BIN)/python tools/newest.py --name $(OLDER)) || exit; \
	if [ -z "$$python" ]; then echo "lowest: no CPython among $(OLDER) found" >&2; exit 1; fi; set -x; \
	$(NOX) --error-on-missing-interpreters -s "versions($$python-lowest)" -- $(or $(TESTS),$(MOST) tests --pyargs flaxsplit)
	@echo "make lowest: all tests passed"

newest: $(VENV)/.installed-versions  ## the tests with the newest dependencies, on the built wheel, every signature checked at run time
	@python=$$($(BIN)/python tools/newest.py --name $(NEWER)) || exit; \
	if [ -z "$$python" ]; then echo "newest: skipped, no CPython >= 3.12 found"; exit; fi; set -ex; \
	$(NOX) --error-on-missing-interpreters -s empty; \
	FLAXSPLIT_TYPECHECKER=typeguard $(NOX) -s "versions($$python-newest)" -- $(or $(TESTS),$(MOST) tests --pyargs flaxsplit); \
	set +x; echo "make newest: all tests passed"

check: lint docs audit test slow lowest newest types demo bench  ## all of the above but checked, fuzz, flags and versions
	@echo "make check: everything passed"

# Hours, where none is stored; ONLY=_vmap.py for some, and AGAIN=survivors after a test was written.
mutants: $(VENV)/.installed-test $(VENV)/.installed-mutants  ## the package changed in one place at a time: does a test see it?
	$(BIN)/python tools/mutants.py $(ONLY) $(if $(AGAIN),--again $(AGAIN))

soak: $(VENV)/.installed-test  ## 100,000 steps and eight threads: nothing grows, compiles again or drifts
	$(BIN)/python tools/soak.py

clean:  ## remove the environments and what tools left behind
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest $(VENV)-types .venv-nox build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define require-python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "flaxsplit needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)"; \
	echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
endef

STUBS := $(shell find stubs -name '*.pyi' -o -name '*.toml')

# A stamp says that an installation ended well; a changed pyproject.toml makes it stale, a second call does nothing.
$(VENV)/.installed-stubs: $(VENV)/.created $(STUBS)
	$(BIN)/python -m pip install ./stubs
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

# Not deleted as an intermediate file, although only pattern rules name it.
.PRECIOUS: %/.created
%/.created:
	@$(require-python)
	$(PYTHON) -m venv $*
	@touch $@
