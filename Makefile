# Every target sets up .venv by itself on a fresh clone: Python >= 3.11 and make are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('lpt needs Python 3.11 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 11) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit,clip,digits,hub,lora]' --group dev
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

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/codespell

clean:
	rm -rf .venv runs
