# Every target sets up .venv by itself on a fresh clone: Python >= 3.11 and make are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve-demo test test-slow lint docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('lpt needs Python 3.11 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clip,digits,hub,lora,onnx,serve]' --group dev
	touch $@

# Four runs on scikit-learn's digits, long-tailed, on nano, the backbone that comes with the package: no download.
DIGITS := configs/digits_lt
demo: .venv/ready
	rm -rf runs/demo
	$(BIN)/lpt train $(DIGITS)/linear_probe.yaml --out runs/demo/linear_probe_ce
	$(BIN)/lpt train $(DIGITS)/linear_probe.yaml method.loss=la --out runs/demo/linear_probe_la
	$(BIN)/lpt train $(DIGITS)/lpt.yaml "method.epochs=[12, 0]" --out runs/demo/lpt_phase1
	$(BIN)/lpt train $(DIGITS)/lpt.yaml --out runs/demo/lpt
	@echo; echo "All four, side by side; open the report in a browser:"
	@$(BIN)/lpt report runs/demo/lpt --against runs/demo/linear_probe_ce --against runs/demo/linear_probe_la \
		--against runs/demo/lpt_phase1

# The models of the tests are so small that a second thread waits more than it works: a process for each core instead.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses logical --dist worksteal

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# Four tasks of 117 images each, by four methods, on one nano; then a page to ask them on.
SERVE := runs/serve_demo
serve-demo: .venv/ready
	rm -rf $(SERVE)
	$(BIN)/python -m benchmarks.serving.demo $(SERVE)
	$(BIN)/lpt train $(DIGITS)/lpt.yaml data.name=folder data.root=$(SERVE)/data/digits --out $(SERVE)/digits
	$(BIN)/lpt train $(DIGITS)/lpt.yaml data.name=folder data.root=$(SERVE)/data/shapes "method.epochs=[12, 0]" \
		--out $(SERVE)/shapes
	$(BIN)/lpt train $(DIGITS)/linear_probe.yaml data.name=folder data.root=$(SERVE)/data/textures \
		method.name=fine_tune method.tuning=lora method.epochs=8 --out $(SERVE)/textures
	$(BIN)/lpt train $(DIGITS)/linear_probe.yaml data.name=folder data.root=$(SERVE)/data/colours --out $(SERVE)/colours
	$(BIN)/lpt library add $(SERVE)/prompts $(SERVE)/*/prompt.safetensors
	@echo "Images to drop on the page: $(SERVE)/images"
	$(BIN)/lpt serve $(SERVE)/prompts

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/codespell

# The site, in build/site. Every warning is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf .venv runs build
