VENV ?= .venv
BIN = $(VENV)/bin
# uv does not read pip's settings; handed over, it takes a local wheel where there is one. Empty is harmless.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

setup: $(VENV)/.installed
$(VENV)/.installed: setup.py settings.ini pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
