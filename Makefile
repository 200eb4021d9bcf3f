# Every target sets up what it needs: .venv, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint sanitize install bench bench-crossing clean
demo: install
	$(BIN)/msa demo --backend torch --html demo.html

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

# On a GPU: every kernel on awkward shapes, first as it is (which compiles it), then with each of its
# accesses checked. Without PyTorch's cache each tensor is an allocation, whose end is known.
SANITIZED := $(BIN)/python -m pytest -n0 -q tests/test_sanitized.py
sanitize: install
	$(SANITIZED)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		--target-processes all $(SANITIZED)

install: .venv/installed

bench: install
	$(BIN)/msa bench prefill --plots docs
	$(BIN)/msa bench train

bench-crossing: install
	$(BIN)/python -m benchmarks.crossing

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

clean:
	rm -rf .venv digits.png demo.html
