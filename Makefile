PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.installed
# pip says errors only, papermill what the notebook's own bars say, as they move
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
PAPER := $(sort $(wildcard nbs/8*.ipynb nbs/9*.ipynb))
PAPERMILL := $(BIN)/papermill --no-progress-bar --stderr-file -

.PHONY: eval test docs figures notebooks bench demo peers clean

eval: $(READY)          # the main job: the evaluation notebook on the embedded default
	@mkdir -p runs
	$(PAPERMILL) nbs/90_eval.ipynb runs/90_eval.ipynb

test: export MPLBACKEND := Agg
test: $(READY)          # export in step and notebooks clean, then the notebooks' own checks, then the rest
	$(BIN)/pytest -q tests/test_repo.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_repo.py

notebooks: $(READY)     # re-execute the library notebooks in place; paper notebooks are executed by make figures
	for nb in nbs/index.ipynb nbs/[0-9]_*/*.ipynb; do $(BIN)/jupyter execute --inplace $$nb || exit 1; done
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

docs: $(READY)          # the notebooks as a searchable site in _docs: python -m http.server -d _docs
	$(BIN)/python -m biojepa.report.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f _proc/mkdocs.yml

figures: $(READY)       # every paper notebook on the default run: figures/, its MANIFEST.json, and the outputs in nbs/
	@mkdir -p runs
	@for nb in $(PAPER); do echo "== $$nb"; $(PAPERMILL) $$nb runs/$$(basename $$nb) || exit 1; done
	$(BIN)/python -m biojepa.report.paper $(PAPER:nbs/%=runs/%)

demo: $(READY)          # the small model in the package, trained anew
	$(BIN)/python -m biojepa.report.demo

bench: $(READY)         # collapsed against naive: figures/benchmark.csv, .md and .png
	$(BIN)/python -m biojepa.report.benchmark

PEERS := state cpa
RUN ?= $(error give the folder of a run, as make peers RUN=runs/5e3e9e35fdcd-0)

peers: $(READY) $(PEERS:%=.venvs/%/.installed)  # peers with environments of their own answer a run: peers/README.md
	$(BIN)/python -m biojepa.predict.methods $(RUN)
	for p in $(PEERS); do .venvs/$$p/bin/python peers/$$p.py $(RUN)/peers $(PEER_OPTIONS) || exit 1; done

.venvs/%/.installed: peers/%.lock
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r $<
	@touch $@

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv: some minutes, then nothing to do again"
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks; fi
	@mkdir -p runs && touch $@

clean:                  # everything that can be made again
	rm -rf .venv .venvs runs _docs _proc *.egg-info
