# Everything runs in its own virtual environment, made from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow coverage test-all outputs size field sharp sharp-sample bench bench-all release-check mutants lint types reports docs serve clean

demo: $(VENV)/.demo
	$(BIN)/lora demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --conformance-json conformance.json --junit-xml junit.xml

# What takes long.
test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --junit-xml junit-slow.xml

# The lines of lora/ that the tests of both run, with few examples: tracing takes half as long again.
coverage: $(VENV)/.test
	rm -f .coverage.*
	OMP_NUM_THREADS=1 LORA_PROFILE=quick $(BIN)/coverage run -m pytest -n 2 -m "not foreign"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --fail-under=90

# Everything, with peers and foreign readers: needs node and npm.
test-all: $(VENV)/.all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m ""

# What the documentation's examples print, written below them.
outputs: $(VENV)/.test
	LORA_OUTPUTS=write OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:randomly README.md docs tests/unit/test_docs.py -k "CodeFence or tutorial or commands_of_a_page or picture_of_a_terminal"
	$(BIN)/python docs/outputs.py

# Lines, code tokens and words of docstring, by area.
size: $(VENV)/bin/python
	$(BIN)/python -m tests.size

# The suite against libraries that others wrote, each in a folder of its own, or some: make field ROWS="litgpt peft".
field: $(VENV)/.test
	$(BIN)/python -m tests.field $(ROWS)

# Breaks the sentence of each requirement on purpose and sees that a test of it fails.
sharp: $(VENV)/.test
	$(BIN)/python -m tests.sharp

# Three minutes of make sharp, other ones on each day.
sharp-sample: $(VENV)/.test
	$(BIN)/python -m tests.sharp --seconds 180

# This library beside its peers, about twenty minutes on two cores, and the README's table of it.
BENCH := forward lifecycle routing throughput merge_extract training fetching commands
bench: $(VENV)/.test
	$(BIN)/lora bench $(BENCH:%=--only %) --out $(VENV)/bench.json
	$(BIN)/python docs/figures.py $(VENV)/bench.json

# The same, and how cost grows, and any model with a checkpoint of 2 GB: ten to twenty minutes more.
bench-all: BENCH += growth models
bench-all: bench

# Before a release: an error where results are of other sources than these, or a page tells other figures.
release-check: $(VENV)/.test
	$(BIN)/python docs/release_check.py

# Mutants of the pure core that tests/properties lets live, or of one module: make mutants MODULE=lora/factors.py.
# About a second each on one core; what was run is kept in mutants/, where a run that was stopped goes on.
mutants: $(VENV)/.mutants
	OMP_NUM_THREADS=1 LORA_PROFILE=quick $(BIN)/python -m tests.mutants $(MODULE)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/mypy

# The suite's verdicts on each binding of this repository; the faulty one's run fails, as it must.
REPORTS := $(addprefix conformance/,reference.json numpy-only.json peft.json faulty.json)
BINDING_reference := lora.testing.reference:BINDING
BINDING_numpy-only := tests.bindings.numpy_only:BINDING
BINDING_peft := tests.bindings.peft:BINDING
BINDING_faulty := tests.faults.layer:ScalingIgnored

conformance/%.json: $(wildcard lora/*.py lora/*/*.py tests/properties/*.py tests/bindings/*.py tests/faults/*.py) | $(VENV)/.dev
	mkdir -p conformance
	-OMP_NUM_THREADS=1 LORA_PROFILE=quick $(BIN)/lora conformance --binding $(BINDING_$*) --json-file $@

reports: $(VENV)/.dev
	$(MAKE) --jobs 2 $(REPORTS)

docs: reports
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: reports
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV): 1.8 GB, some minutes."
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.all: $(VENV)/.test
	$(PIP) --editable '.[test,interop]'
	touch $@

$(VENV)/.mutants: $(VENV)/.test
	$(PIP) mutmut
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) --editable '.[test,docs,lint]'
	touch $@

clean:
	rm -rf $(VENV) .field site docs/generated conformance conformance.json junit.xml junit-slow.xml sharp.json
