# SPDX-License-Identifier: Apache-2.0
# `make demo` needs Debian or Ubuntu with Python 3.10 to 3.13 and nothing else; `make test` and what follows Python 3.10 to 3.12.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.installed

.PHONY: help demo test bench soak ablation lint clean

help:
	@echo "make demo    replay the demo bag through the node over DDS; table, out/demo/report.json, out/demo/voxels.png"
	@echo "make test    install everything and run the whole test suite"
	@echo "make bench   print the benchmark tables and write out/bench/*.json"
	@echo "make soak    twenty minutes of the node at full rate: memory, file handles, threads"
	@echo "make ablation  measure what each idea of the training buys (hours; goes on where it stopped); docs/ablation.md"
	@echo "make lint    ruff check and format check"
	@echo "make clean   remove .venv and out"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.10 to 3.13 is needed and $(PYTHON) is another; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory system-venv
	@$(PYTHON) -m venv $(VENV)

# Debian and Ubuntu split venv's other half off into a package of its own.
.PHONY: system-venv
system-venv:
	@package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	echo "installing $$package with apt-get, which $(PYTHON) needs to make a virtual environment"; \
	$$root apt-get -q update >/dev/null && $$root apt-get -qy install --no-install-recommends $$package >/dev/null \
	  || { echo "could not install $$package; install it by hand, then call make again" >&2; exit 2; }

# One stamp per set of packages, so that a second run installs nothing.
$(STAMPS)-demo: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[ros]'
	@touch $@

$(STAMPS)-test: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[ros,train,dev]'
	@touch $@ $(STAMPS)-demo

demo: $(STAMPS)-demo
	@$(BIN)/python -m occflownet_ros.demo --out out/demo

test: $(STAMPS)-test
	$(BIN)/python -m pytest tests

bench: $(STAMPS)-test
	$(BIN)/python -m benchmarks.pipeline --out out/bench
	$(BIN)/python -m benchmarks.assembler --out out/bench
	$(BIN)/python -m benchmarks.outputs --out out/bench
	$(BIN)/python -m benchmarks.data --out out/bench
	$(BIN)/python -m benchmarks.rendering --out out/bench
	$(BIN)/python -m benchmarks.surface --out out/bench
	$(BIN)/python -m benchmarks.mesh --out out/bench
	$(BIN)/python -m benchmarks.encoder --out out/bench
	$(BIN)/python -m benchmarks.engines --out out/bench

soak: $(STAMPS)-test
	$(BIN)/python -m benchmarks.soak --out out/bench

ABLATION := out/ablation
MINICITY = $(BIN)/python -m training.data.minicity --image-size 480x270 --force

# A root's seed is its name. Scenes of ten keyframes, so that a keyframe has four neighbours on both sides; networks learn from
# those and from shorter ones.
ABLATION_ROOTS := $(foreach seed,501 502 503 101 102 103 104,$(ABLATION)/$(seed))

$(ABLATION)/50%/.complete: | $(STAMPS)-test
	$(MINICITY) --out $(@D) --scenes 12 --keyframes 10 --seed 50$*
	@touch $@

$(ABLATION)/10%/.complete: | $(STAMPS)-test
	$(MINICITY) --out $(@D) --scenes 8 --keyframes 8 --seed 10$*
	@touch $@

$(ABLATION)/9701/.complete: | $(STAMPS)-test
	$(MINICITY) --out $(@D) --scenes 4 --keyframes 6 --seed 9701
	@touch $@

# Labels made by fitting whole logs, for the rows that compare ways to the same labels.
ALTERNATIVE_ROOTS := $(ABLATION)/501 $(ABLATION)/502

$(ABLATION)/50%/.fitted: $(ABLATION)/50%/.complete
	$(BIN)/python -m training.fit_scene --dataroot $(@D) --out $(@D)/gts_fitted --pictures 0
	@touch $@

ablation: $(ABLATION_ROOTS:%=%/.complete) $(ALTERNATIVE_ROOTS:%=%/.fitted) $(ABLATION)/9701/.complete
	$(BIN)/python -m benchmarks.supervision --dataroot $(ABLATION)/501 --out $(ABLATION) --pictures --page docs/ablation.md
	$(BIN)/python -m benchmarks.supervision --dataroot $(ABLATION)/501 --out $(ABLATION) --page docs/ablation.md \
	  --rows single static filter flow --keyframes 3 --steps 64
	$(BIN)/python -m benchmarks.network_training --dataroot $(ABLATION_ROOTS) --val-dataroot $(ABLATION)/9701 \
	  --out $(ABLATION) --page docs/ablation.md --rows single static filter flow 2d3d 3d
	$(BIN)/python -m benchmarks.network_training --dataroot $(ALTERNATIVE_ROOTS) --val-dataroot $(ABLATION)/9701 \
	  --out $(ABLATION)/alternatives --page docs/ablation.md --section alternatives --rows flow surface fitted 3d

lint: $(STAMPS)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) out
