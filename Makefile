# Without make (Windows): python scripts/dev.py demo | test | test-slow | lint | schema
PYTHON ?= python3

.PHONY: demo test test-slow lint schema

demo test test-slow lint schema:
	$(PYTHON) scripts/dev.py $@
