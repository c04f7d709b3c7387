# make           everything: .venv, SFT, three DPO runs, a table, and figures in plots/
# make quick     the same with 20 steps each, in runs/quick: to see whether all works here
# make test      the linter and the tests
# make study     the runs behind plots/study/README.md: four parts of 15 to 120 minutes, which are also
#                targets: methods, rlhf, interventions, collapse; each resumes where it stopped
# make publish   the tables and figures of both pages, from the JSON of the parts
# make clean     forget the four models (.venv stays, and so does runs/study with its hours of work)
#
# After an upgrade of Python, remove .venv (rm -rf .venv): it is made anew.

PYTHON ?= python3
RUNS := runs
PLOTS := plots
STEPS :=
SAMPLES :=

# What sets each run apart from the defaults. After a change here, run `make clean` first: make
# compares the times of files, not flags.
FLAGS_dpo_offline := --pairs offline
FLAGS_dpo_offline_kl := --pairs offline --kl-weight 0.1
FLAGS_dpo :=

DPO := dpo_offline dpo_offline_kl dpo
MODELS := $(RUNS)/sft.pt $(DPO:%=$(RUNS)/%.pt)
STUDY := methods rlhf interventions collapse

all: $(PLOTS)/results.json

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 1; }
	@echo "Installing PyTorch and three more packages into .venv. On Linux pip takes the CUDA build,"
	@echo "a download of 2.7 GB; README.md says how to take the CPU build, of 0.2 GB."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --requirement requirements.txt
	touch $@

$(RUNS)/sft.pt: train_sft.py model.py data.py | .venv/installed
	.venv/bin/python train_sft.py $(STEPS) --out $@

$(DPO:%=$(RUNS)/%.pt): $(RUNS)/%.pt: train_dpo.py $(RUNS)/sft.pt | .venv/installed
	.venv/bin/python train_dpo.py $(FLAGS_$*) $(STEPS) --sft $(RUNS)/sft.pt --out $@

$(PLOTS)/results.json: evaluate.py plots/figures.py $(MODELS) | .venv/installed
	.venv/bin/python evaluate.py $(SAMPLES) --sft $(RUNS)/sft.pt --plots-dir $(PLOTS) $(MODELS)

quick:
	$(MAKE) RUNS=runs/quick PLOTS=runs/quick STEPS="--steps 20" SAMPLES="--samples 2"

study: .venv/installed
	for part in $(STUDY); do .venv/bin/python -m plots.study.$$part || exit; done

$(STUDY): .venv/installed
	.venv/bin/python -m plots.study.$@

publish: .venv/installed
	.venv/bin/python -m plots.study.tables

.venv/tests-installed: tests/requirements.txt .venv/installed
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --requirement tests/requirements.txt
	touch $@

test: .venv/tests-installed
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m pytest --quiet

clean:
	rm -rf $(MODELS) runs/quick

.PHONY: all quick study $(STUDY) publish test clean
