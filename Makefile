# Every target sets up what it needs: .venv, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := pip install --quiet --disable-pip-version-check
SEED := $(shell date +%s)

.PHONY: demo test test-seeds test-shuffled test-newest lint docs docs-serve docs-look \
	docs-zensical package \
	sanitize install bench bench-crossing clean
.NOTPARALLEL:  # there is one .venv
unexport PYTHONDONTWRITEBYTECODE  # images of containers set it; then each process compiles again

demo: .venv/demo.installed
	$(BIN)/msa demo --backend torch --html demo.html

test: .venv/test.installed
	$(BIN)/python -m pytest

# Every property on every backend, with cases that no run had before: other seeds, other cases.
SEEDS ?= 1 2 3 4 5 6 7 8 9 10
test-seeds: .venv/test.installed
	for seed in $(SEEDS); do \
		$(BIN)/python -m pytest tests/test_properties.py --hypothesis-seed=$$seed || exit 1; \
	done

# The same result in any order, with any number of workers. SEED=N shuffles as another run did.
test-shuffled: .venv/test.installed
	$(BIN)/python -m pytest -n0 --order reversed
	$(BIN)/python -m pytest -n1 --order shuffled:$(SEED)
	$(BIN)/python -m pytest -n2 --order shuffled:$(SEED)1
	$(BIN)/python -m pytest -n4 --order reversed

# What others release, as of today: whatever is imported from it here is tried. torch stays, with the
# triton that belongs to it: its newest release is a build for CUDA of several GB.
NEWEST := .venv/newest/bin
test-newest:
	$(PYTHON) -m venv --clear .venv/newest
	grep -E '^(torch|triton)==' constraints.txt > .venv/newest/kept.txt
	$(NEWEST)/$(PIP) --upgrade -c .venv/newest/kept.txt -e '.[$(EXTRAS_test)]'
	$(NEWEST)/pip list --disable-pip-version-check
	$(NEWEST)/python -m pytest tests/test_transformers*.py tests/test_model_transformers.py \
		tests/test_convert*.py tests/test_ops*.py tests/test_verify_target.py tests/test_order.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/codespell

# The site: every block of code on its pages is run, kernels in Triton's interpreter, and any that
# fails fails the build (`--quiet` would hide it).
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m docs.hooks.build
docs: install
	$(SITE) build --strict
	$(BIN)/python -m docs.hooks.notebooks
	$(BIN)/python -m docs.hooks.links

# The same with the generator's successor, to see what differs. It decides nothing: `-` ignores errors.
ZENSICAL := .venv/zensical
docs-zensical: install
	$(PYTHON) -m venv $(ZENSICAL)
	$(ZENSICAL)/bin/$(PIP) zensical
	sed 's/^site_dir: .*/site_dir: site-zensical/' mkdocs.yml > zensical.yml
	-TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		PYTHONPATH=.:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		$(ZENSICAL)/bin/zensical build -f zensical.yml

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

# Each kind of environment is a list of extras, installed into .venv beside the others.
EXTRAS_demo := demo,model
EXTRAS_test := torch,triton,verify,demo,model,transformers,dev
EXTRAS_all := all
install: .venv/all.installed

# Results and figures go to benchmarks/run; python -m docs.hooks.adopt benchmarks/run commits them.
bench: install
	$(BIN)/msa bench prefill --plots benchmarks/run
	$(BIN)/msa bench train
	$(BIN)/msa bench decode
	$(BIN)/msa bench integrations

bench-crossing: install
	$(BIN)/python -m benchmarks.crossing

.venv/%.installed: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -c constraints.txt -e '.[$(EXTRAS_$*)]'
	touch $@

clean:
	rm -rf .venv site digits.png demo.html
