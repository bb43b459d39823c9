VENV ?= .venv
OLDEST ?= .venv-oldest
PYTHON ?= python3
MINUTES ?= 120
RUN := $(VENV)/bin/python
# The models are tiny: processes side by side, one thread each.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadgroup

.PHONY: demo test test-oldest attack soak beside clean

demo: $(VENV)/.installed
	$(RUN) recipes/demo.py

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) $(PYTEST)

# The same tests with the oldest versions that pyproject.toml allows, but for those that need a newer framework itself;
# what those versions warn of is no news. Attacks are on files, ranks and rows, and not on versions.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -m "not newest" -o filterwarnings=default --ignore=tests/attack

# The attacks of the suite at length.
attack: $(VENV)/.installed
	ATTACK=60 OMP_NUM_THREADS=1 $(RUN) $(PYTEST) tests/attack

# A command on one core, killed and on full disks at random.
soak: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN) tests/attack/soak.py --minutes $(MINUTES)

# What would be installed beside other frameworks.
beside: $(VENV)/.installed
	$(RUN) tests/beside.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) outputs
