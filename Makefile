# Two commands: `make demo` trains LeNet in a minute; `make test` runs everything that checks this library.
# Both make the virtual environment .venv here on first use. Paths stay relative, so a space above this folder is no matter.

PYTHON ?= python3
WORKERS ?= 2
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
export PYTHONUTF8 := 1

ROOM ?=

.PHONY: demo test check sabotage fuzz docs format clean

demo: .venv/.installed
	@$(PY) -m etude run vision/lenet
	@echo "      (once in each shell: . .venv/bin/activate)"

# the closing line of pytest stays the last thing on the screen; ROOM=gans runs that room's share
test: check
ifeq ($(ROOM),)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)
else
	@OMP_NUM_THREADS=1 ETUDE_ONLY=$(ROOM)/ $(PY) -m pytest -n $(WORKERS) $(wildcard tests/facts/$(ROOM) tests/learns/$(ROOM)) tests/contract
endif

# puts one fault at a time into a copy and runs that method's tests: results/sabotage
sabotage: .venv/.installed-dev
	@$(PY) tests/sabotage/run.py $(ROOM) --workers $(WORKERS)

# thousands of legal and illegal settings and damaged files: no traceback, no hang
fuzz: .venv/.installed-dev
	@OMP_NUM_THREADS=1 $(PY) tests/fuzz/run.py

check: .venv/.installed-dev
	@$(PY) -m ruff check .
	@$(PY) -m basedpyright --pythonpath $(PY)

docs: .venv/.installed-dev
	@$(PY) docs/generate.py
	@$(PY) -m zensical build --clean --strict
	@echo "open site/index.html"

format: .venv/.installed-dev
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:
	rm -rf .venv .cache build dist site docs/methods docs/generated

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"etude needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}; name another, as in: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv

# torch comes first and alone, from constraints.txt, so that nothing else can choose its build
.venv/.installed: pyproject.toml constraints.txt | $(PY)
	@echo "installing etude into .venv (torch is some 200 MB; a minute or more) ..."
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "installing what the tests need into .venv ..."
	@$(PIP) --editable '.[dev,docs,rl,atari,mujoco,text,track,export]'
	@touch $@
