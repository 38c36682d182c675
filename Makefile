# Without make (Windows): python scripts/dev.py demo | demo-text | test | test-slow | lint | schema
PYTHON ?= python3

.PHONY: demo demo-text test test-slow lint schema

demo demo-text test test-slow lint schema:
	$(PYTHON) scripts/dev.py $@
