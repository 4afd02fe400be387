# What a newcomer needs is `make lab` and `make test`; both install on first use, into .venv.
PYTHON ?= python3
# One more than most machines of a CI have cores: tests of servers and processes wait a lot.
WORKERS ?= 3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
START := 00_start_here.ipynb
# Jupyter refuses to run as root unless told to; containers often have no other user.
ALLOW_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
# JupyterLab asks nobody on the internet for news or updates, and does not ask whether it may.
SETTINGS := .venv/etc/jupyter/labconfig/default_setting_overrides.json
NO_NEWS := {"@jupyterlab/apputils-extension:notification": \
  {"fetchNews": "false", "checkForUpdates": false}}

# The packages of one extra in pyproject.toml, for those that pip must not resolve with the others.
packages = $$(sed -n '/^$(1) = /,/^]/s/^ *"\(.*==.*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help lab test report workshop results models experiments bench format lock clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

lab: $(INSTALLED) ## JupyterLab, opened on the first notebook; e.g. ARGS=--no-browser
	$(BIN)/jupyter lab --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/$(START) \
	  $(ALLOW_ROOT) $(ARGS)

test: $(INSTALLED) ## style, unit tests, every notebook, and JupyterLab in a browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

report: $(INSTALLED) ## the main comparison as one HTML page: build/report.html
	@mkdir -p build
	$(BIN)/python -m workbench.explore.report --output build/report.html

workshop: $(INSTALLED) ## the students' edition of the notebooks: build/workshop
	$(BIN)/python -m workbench.explore.workshop build/workshop $(ARGS)

results: $(INSTALLED) ## measure the tables of the README again (half an hour)
	$(BIN)/python -m workbench.explore.results $(ARGS)

models: $(INSTALLED) ## train the reference networks again (hours on two cores)
	$(BIN)/python data/models/train.py $(ARGS)

experiments: $(INSTALLED) ## measure again what the notebooks only show (hours on two cores)
	$(BIN)/python data/experiments/run.py $(ARGS)

bench: $(INSTALLED) ## side by side with other tools; installs the extra [bench] first
	$(BIN)/python -m pip install --quiet --no-build-isolation -c requirements.lock -e ".[bench]"
	$(BIN)/python -m pip install --quiet --no-deps $(call packages,bench-alone)
	for peer in $(call packages,bench-servers); do \
	  room=build/peers/$${peer%%==*}; test -x $$room/bin/$${peer%%==*} || { \
	    $(PYTHON) -m venv $$room && $$room/bin/python -m pip install --quiet \
	      $$(grep '^onnxruntime==' requirements.lock) $$peer; } || exit 1; done
	$(BIN)/jupyter nbconvert --to notebook --execute --output-dir build notebooks/benchmarks/*.ipynb

format: $(INSTALLED) ## put code and notebooks in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolved in an environment of its own, so that nothing installed by hand gets in.
lock: ## write requirements.lock from pyproject.toml
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install "$$(grep -o 'torch==[0-9.]*' pyproject.toml)"
	build/lock/bin/python -m pip install ".[test]"
	grep '^#' requirements.lock > build/requirements.lock
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude workbench \
	  | sed -e '/^nvidia-/d; /^cuda-/d; /^triton==/d' -e 's/+.*//' \
	  | tr A-Z_ a-z- | LC_ALL=C sort >> build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build/lock

clean: ## remove .venv and everything that was made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and by itself, so that nothing pulls another build of it.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps $(call packages,alone)
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@mkdir -p $(dir $(SETTINGS)) && echo '$(NO_NEWS)' > $(SETTINGS)
	@touch $@
