# make           everything: .venv, SFT, three DPO runs, a table, and figures in plots/
# make quick     the same with 20 steps each, in runs/quick: to see whether all works here
# make test      the linter and the tests
# make lesson    the runs behind plots/RESULTS.md (an hour or two; resumes where it stopped)
# make optimum   its runs with a noisy judge (an hour or two; resumes where it stopped)
# make publish   both, then the tables and figures of both pages
# make clean     forget the trained models (.venv stays)

PYTHON ?= python3
RUNS := runs
PLOTS := plots

# What sets each run apart from the defaults. The rates are those that the lesson found best.
FLAGS_dpo_offline := --pairs offline --lr 3e-4
FLAGS_dpo_offline_nll := --pairs offline --nll-weight 1 --lr 1e-3

DPO := dpo_offline dpo_offline_nll dpo
MODELS := $(RUNS)/sft.pt $(DPO:%=$(RUNS)/%.pt)

all: $(RUNS)/evaluated

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 1; }
	@echo "Installing PyTorch and three more packages into .venv, which takes a minute or more"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --requirement requirements.txt
	touch $@

$(RUNS)/sft.pt: train_sft.py model.py data.py | .venv/installed
	.venv/bin/python train_sft.py $(STEPS) --out $@

$(DPO:%=$(RUNS)/%.pt): $(RUNS)/%.pt: train_dpo.py $(RUNS)/sft.pt | .venv/installed
	.venv/bin/python train_dpo.py $(FLAGS_$*) $(STEPS) --sft $(RUNS)/sft.pt --out $@

$(RUNS)/evaluated: evaluate.py plots/figures.py plots/tables.py $(MODELS) | .venv/installed
	.venv/bin/python evaluate.py $(SAMPLES) --sft $(RUNS)/sft.pt --plots-dir $(PLOTS) $(MODELS)
	touch $@

quick:
	$(MAKE) RUNS=runs/quick PLOTS=runs/quick STEPS="--steps 20" SAMPLES="--samples 2"

lesson: .venv/installed
	.venv/bin/python -m plots.lesson

optimum: .venv/installed
	.venv/bin/python -m plots.optimum

publish: lesson optimum
	.venv/bin/python -m plots.tables

.venv/tests-installed: tests/requirements.txt .venv/installed
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --requirement tests/requirements.txt
	touch $@

test: .venv/tests-installed
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m pytest --quiet

clean:
	rm -rf runs

.DELETE_ON_ERROR:
.PHONY: all quick lesson optimum publish test clean
