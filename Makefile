VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
# uv does not read pip's settings; handed over, it takes a local wheel where there is one. Empty is harmless.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# One thread a process and as many processes as cores: small models gain nothing from more threads.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup test demo site readme lab clean

help:  ## Show what there is
	@echo "mixbook: the notebooks in nbs/ are the source; make TARGET does the rest."
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Make the environment (.venv) with everything in it
$(VENV)/.installed: setup.py settings.ini pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test: setup  ## Run every notebook and every test
	@bad=0; \
	$(BIN)/python tests/notebooks.py --workers $(WORKERS) || bad=1; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal || bad=1; \
	if [ $$bad = 1 ]; then echo "make test: something failed, see above."; fi; exit $$bad

demo: setup  ## From text to a confirmed recipe on this machine (DEMO=--quick for the short one)
	$(BIN)/mixbook demo $(DEMO)

site: setup  ## Render the docs site into _docs and say what to open
	$(BIN)/python nbs/_site/build.py

readme: setup  ## Make README.md from nbs/index.ipynb
	$(BIN)/python nbs/_site/readme.py

lab: setup  ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

clean:  ## Remove what was built (not the environment)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis
	find nbs tests mixbook -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
