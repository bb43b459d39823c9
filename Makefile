VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(RUN) recipes/demo.py

test: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs
