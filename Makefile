# The only door: every command that people and CI use. Needs python3 (3.11 or newer), python3-venv and make.
PY := .venv/bin/python
.PHONY: all setup demo check test sim bench clean

all: check test

setup: .venv/done
.venv/done: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/done

demo: setup  ## the main job on this machine, no GPU needed: an H200's incidents, played at speed
	$(PY) tests/demo.py

check: setup  ## style, types, and who may import whom
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

test: setup  ## everything that needs neither GPU, systemd, vLLM nor minutes
	$(PY) -m pytest -n auto --maxschedchunk 16 -m 'not acceptance'

sim: setup  ## many more random incidents: make sim STORIES=5000
	GPUWATCH_STORIES=$(or $(STORIES),5000) $(PY) -m pytest -n auto --maxschedchunk 16 tests/simulation

bench: setup  ## cost beside a bare loop: make bench ONLY=daemon
	$(PY) bench/run.py $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-state
