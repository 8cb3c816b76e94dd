SHELL := /bin/sh
PYTHON ?= python3
IMAGE ?= samcancer
TARGET ?= slim

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test lint image upload locks sbom audit peers clean
SUPPLY := build/supply
PEERS := build/peers

# The stamp is made last, so that an installation that broke off is done again.
.venv: .venv/.complete
.venv/.complete: requirements.txt requirements-torch.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-torch.txt -e '.[eval,training,dev]'
	touch $@

lint: .venv
	ruff check
	ruff format --check
	mypy
	lint-imports

# One phantom CT, segmented: the mask, a picture, and the Dice.
demo: .venv
	python -m benchmarks.demo --out demo

# The container tests among these need an engine and minutes: CONTAINER_TESTS=1 make test.
test: .venv
	python -m pytest

# With the machine's own docker, or, where CONTAINER_ENGINE names a script that brings an engine up, with that (the full name,
# because buildah would tag localhost/NAME, and the archive would not hold the NAME that graders run).
WITH_ENGINE = $(if $(CONTAINER_ENGINE),source "$(CONTAINER_ENGINE)" &&)
BUILD = $(if $(CONTAINER_ENGINE),container_build docker.io/library/$(IMAGE):latest . --layers --target $(TARGET),docker build --target $(TARGET) -t $(IMAGE):latest .)

image:
	bash -c '$(WITH_ENGINE) $(BUILD)'

# What a challenge takes: NAME.tar.gz holds the image NAME:latest. In two steps, because a pipe would hide a failed save.
upload: image
	bash -c '$(WITH_ENGINE) docker save $(IMAGE):latest -o $(IMAGE).tar'
	$$(command -v pigz || command -v gzip) --force $(IMAGE).tar
	ls -l $(IMAGE).tar.gz

# What an image installs, with all that it needs and the hashes of their files: `make locks` after a change of their pins.
locks: requirements.lock requirements-torch.lock
requirements-torch.lock: requirements.txt
%.lock: %.txt $(SUPPLY)/.complete
	$(SUPPLY)/bin/uv pip compile $< --quiet --generate-hashes --no-header --no-annotate \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_28 -o $@

# What the Python packages of the target `slim` are, for whoever has to know (CycloneDX).
sbom: $(SUPPLY)/.complete
	$(SUPPLY)/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible -o sbom.json

# Known vulnerabilities of those; asks a service on the net.
audit: $(SUPPLY)/.complete
	$(SUPPLY)/bin/pip-audit --requirement requirements.lock --require-hashes --disable-pip

# Tools of their own: nothing else needs them.
$(SUPPLY)/.complete: Makefile
	$(PYTHON) -m venv $(SUPPLY)
	$(SUPPLY)/bin/pip install --quiet uv==0.13.9 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

# Other teams' networks, for the benchmarks that compare with them. They take the checkout's torch, which is large.
peers: $(PEERS)/.complete
$(PEERS)/.complete: benchmarks/peers.txt .venv/.complete
	$(PYTHON) -m venv $(PEERS)
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$($(PEERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/checkout.pth
	$(PEERS)/bin/pip install --quiet -r benchmarks/peers.txt
	touch $@

# What can be made again in a moment; .venv/, runs/, cache/ and uploads stay.
clean:
	rm -rf demo build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
