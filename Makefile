# make           everything: .venv, SFT, three DPO runs, results and figures in plots/
# make test      the linter and the tests
# make lesson    the runs behind the README's comparisons (hours; resumes where it stopped)
# make judge     the runs with a judge that errs (longer still)
# make publish   the lesson, then plots/published.json and the README's numbers from both
# make bench     how fast the scripts are on this machine
# make mutants   the tests on mutants of a clone of the last commit; lists those that pass (hours)
# make clean     forget the trained models (.venv stays)

PYTHON ?= python3
BIN := .venv/bin

# For a quick look, or a test of this file: make STEPS=20 SAMPLES=2 PLOTS=runs/plots
STEPS :=
SAMPLES := 100
PLOTS := plots

MODELS := sft dpo_offline dpo_offline_nll dpo

# What sets each DPO run apart: runs/dpo.pt has the defaults, the others the learning rate that the
# lesson found best for them.
FLAGS_dpo_offline := --pairs offline --lr 3e-4
FLAGS_dpo_offline_nll := --pairs offline --nll-weight 1 --lr 1e-3

all: $(PLOTS)/results.json

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 1; }
	@echo "Installing PyTorch and three more packages into .venv, which takes a minute or more"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar on --requirement requirements.txt
	touch $@

runs/sft.pt: train_sft.py model.py data.py | .venv/installed
	$(BIN)/python train_sft.py $(STEPS:%=--steps %) --out $@

$(filter runs/dpo%,$(MODELS:%=runs/%.pt)): runs/%.pt: train_dpo.py runs/sft.pt
	$(BIN)/python train_dpo.py $(FLAGS_$*) $(STEPS:%=--steps %) --out $@

$(PLOTS)/results.json: evaluate.py plots/figures.py plots/tables.py $(MODELS:%=runs/%.pt)
	$(BIN)/python evaluate.py --samples $(SAMPLES) --plots-dir $(PLOTS) $(MODELS:%=runs/%.pt)

lesson: .venv/installed
	$(BIN)/python plots/lesson.py

judge: .venv/installed
	$(BIN)/python plots/lesson.py --judge

publish: lesson
	$(BIN)/python plots/tables.py

.venv/tests-installed: tests/requirements.txt .venv/installed
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement tests/requirements.txt
	touch $@

test: .venv/tests-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest --quiet

mutants: .venv/tests-installed
	$(BIN)/pip install --disable-pip-version-check --quiet cosmic-ray==8.7.0
	rm -rf runs/mutants && git clone --quiet . runs/mutants
	cd runs/mutants && PATH="$(CURDIR)/$(BIN):$$PATH" && found=../mutants.sqlite && rm -f $$found && \
		cosmic-ray init .cosmic-ray.toml $$found && \
		cr-filter-operators $$found .cosmic-ray.toml && \
		cosmic-ray exec .cosmic-ray.toml $$found && \
		cr-report --surviving-only --show-diff $$found

bench: .venv/installed
	$(BIN)/python tests/benchmark.py

clean:
	rm -rf runs

.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all lesson judge publish test mutants bench clean
