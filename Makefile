SHELL := /bin/sh
PYTHON ?= python3
IMAGE ?= samcancer

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test lint image upload clean

# The stamp is made last, so that an installation that broke off is done again.
.venv: .venv/.complete
.venv/.complete: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt -e '.[eval,training,dev]'
	touch $@
