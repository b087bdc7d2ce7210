# Each target works on a fresh clone: it makes .venv, installs what it needs once, and is quick the second time.
#   make run | test | test-flower | bench | record | lint | kernels | clean     ARGS="..." goes to federa or pytest
#   PYTHON=python3.12   which Python makes the environment (3.11 or newer)
#   SYSTEM_TORCH=1      use the PyTorch that PYTHON already has, such as a CPU build, instead of the pinned one

SHELL := /bin/bash
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
CANDIDATES := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11 python3.14)
VENV := $(if $(SYSTEM_TORCH),.venv-system-torch,.venv)
BIN := $(VENV)/bin

.PHONY: help run test test-flower bench record lint kernels clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

run: $(VENV)/.demo
	$(BIN)/federa run examples/stdlib_docs.yaml --output runs/demo --yardsticks $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

# A deployment of real processes on loopback; the default suite has what needs none.
test-flower: $(VENV)/.test
	$(BIN)/python -m pytest -m flower $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

record: $(VENV)/.test
	for threads in 1 $(shell nproc); do $(BIN)/python -m benchmarks lora_linear --record --threads $$threads; done
	$(BIN)/python -m benchmarks lora_linear_clients --record
	$(BIN)/python -m benchmarks truncated_svd --record --threads 1 --large
	$(BIN)/python -m benchmarks plot
	$(BIN)/python -m benchmarks targets

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every GPU kernel in its shipped tiles, compiled without a GPU: registers, spills, tensor-core instructions.
kernels: $(VENV)/.test
	$(BIN)/python -m benchmarks compile_check $(ARGS)

clean:
	rm -rf .venv .venv-system-torch build *.egg-info federa_kernels/_C.* .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything of csrc/ is here because the install compiles it; Python sources count as they are (--editable).
$(VENV)/.demo $(VENV)/.test: $(VENV)/.made pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@echo "federa: installing .[$(@:$(VENV)/.%=%)] into $(VENV), some minutes the first time"
	@sed '$(if $(SYSTEM_TORCH),/^torch==/d)' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install -qq --constraint $(VENV)/constraints.txt --editable '.[$(@:$(VENV)/.%=%)]'
	@touch $(VENV)/.demo $@

$(VENV)/.made:
	@for python in $(CANDIDATES); do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "federa: PYTHON must be Python 3.11 or newer, got $$($(PYTHON) --version 2>&1);" \
	    "try make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ -n "$(SYSTEM_TORCH)" ]; then \
	  torch=$$("$$python" -c 'from importlib.metadata import distribution; d = distribution("torch"); \
	    assert [*map(int, d.version.split(".")[:2])] >= [2, 11], d.version; print(d.locate_file(""))' 2>&1) || { \
	    echo "federa: SYSTEM_TORCH=1: $$python must have torch 2.11 or newer, got: $$(tail -n1 <<< "$$torch");" \
	      "try make SYSTEM_TORCH=1 PYTHON=/path/to/the/python/that/has/it" >&2; exit 1; }; \
	fi; \
	"$$python" -m venv --clear $(VENV) && \
	if [ -n "$(SYSTEM_TORCH)" ]; then echo "$$torch" > "$$(echo $(VENV)/lib/python*/site-packages)/system_torch.pth"; fi
	@touch $@
