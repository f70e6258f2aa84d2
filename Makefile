# `make demo` and `make test` work in a fresh clone; the first call installs .venv, the next ones start at once.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
STAMP := .venv/.installed
MODEL := examples/models/pydoc-llama

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help venv browser test zoo demo site clean

help:  ## say what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 12

venv: $(STAMP)  ## install .venv with the pinned versions (the other targets do it when they must)

# PyTorch goes first and alone: pip then keeps the build it found, and does not look for another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,train,onnx,openvino,megatron,report,docs,dev]'
	@touch $@

# The tests of the HTML report open it in a real browser, which pip cannot bring.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
			apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		echo "Chromium is missing, and tests/report will fail without it: apt-get install chromium"

test: $(STAMP) browser  ## lint, format, types and tests: all that must be green
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadscope

zoo: $(STAMP)  ## cut every architecture and compare with the oracle; writes out/zoo.json and docs/architectures.md
	@mkdir -p out
	$(BIN)/python tests/zoo/run.py --jobs 2 --out out/zoo.json; code=$$?; \
		$(BIN)/python tests/zoo/document.py out/zoo.json; exit $$code

demo: $(STAMP)  ## prune the bundled language model to 70% of its parameters
	$(BIN)/secateur prune $(MODEL) --out out/pydoc-llama-70 --method minitron --budget params=70% \
		--data $(MODEL)/calib_ids.npy --eval-data $(MODEL)/val_ids.npy --overwrite

site: $(STAMP)  ## build the documentation to out/site/index.html
	$(BIN)/mkdocs build --strict --site-dir out/site

clean:  ## remove results and caches, keep .venv
	rm -rf out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
