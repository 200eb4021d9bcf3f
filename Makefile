# Every target sets up what it needs: .venv, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-seeds lint docs docs-serve docs-look package sanitize install bench bench-crossing clean
demo: install
	$(BIN)/msa demo --backend torch --html demo.html

test: install
	$(BIN)/python -m pytest

# Every property on every backend, with cases that no run had before: other seeds, other cases.
SEEDS ?= 1 2 3 4 5 6 7 8 9 10
test-seeds: install
	for seed in $(SEEDS); do \
		$(BIN)/python -m pytest tests/test_properties.py --hypothesis-seed=$$seed || exit 1; \
	done

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/codespell

# The site: every block of code on its pages is run, kernels in Triton's interpreter, and any that
# fails fails the build (`--quiet` would hide it).
SITE := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: install
	$(SITE) build --strict
	$(BIN)/python -m docs.hooks.links

docs-serve: install
	$(SITE) serve

# Needs Debian's chromium: every page of the built site on a desk, on a phone and in the dark; widgets
# answer. `python -m docs.hooks.look FOLDER` also leaves screenshots.
docs-look: docs
	$(BIN)/python -m docs.hooks.look

# Both distributions, and the wheel in an environment that has nothing else.
package: install
	rm -rf dist .venv/bare
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv .venv/bare
	.venv/bare/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	.venv/bare/bin/python -I tests/packaged.py dist

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
	rm -rf .venv site digits.png demo.html
