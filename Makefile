# make         everything: .venv, SFT, online and offline DPO, tables and figures in plots/
# make test    the tests
# make lesson  also the runs behind the figures on beta and the table of pair recipes
# make seeds   also four more seeds of SFT and both DPO runs
# make bench   how fast the scripts are on this machine
# make clean   forget the trained models (.venv stays)

PYTHON ?= python3
BIN := .venv/bin

# One process a core, up to four (a number that divides the batches), each with one thread: about as
# fast as one process with all the threads, and less disturbed by whatever else runs.
CORES := $(shell getconf _NPROCESSORS_ONLN)
PROCESSES ?= $(shell echo $$(( $(CORES) >= 4 ? 4 : $(CORES) >= 2 ? 2 : 1 )))
ifeq ($(PROCESSES),1)
TRAIN := $(BIN)/python
else
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES)
endif

MODELS := sft dpo_offline dpo
LESSON := dpo_offline_wrong dpo_reference dpo_beta_0.1 dpo_beta_0.3 dpo_beta_2
SEEDS := 1 2 3 4

# What sets each model apart; runs/dpo.pt has the defaults. Fixed pairs get a gentle run: with the
# flags of online pairs next to no right sum is left.
GENTLE := --lr 3e-4 --batch-size 64
FLAGS_dpo_offline := --pairs offline $(GENTLE)
FLAGS_dpo_offline_wrong := --pairs offline-wrong $(GENTLE)
FLAGS_dpo_reference := --pairs reference $(GENTLE)
FLAGS_dpo_beta_0.1 := --beta 0.1
FLAGS_dpo_beta_0.3 := --beta 0.3
FLAGS_dpo_beta_2 := --beta 2

all: plots/results.json

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

runs/sft.pt: train_sft.py model.py data.py | .venv/installed
	$(TRAIN) train_sft.py --out $@

$(patsubst %,runs/%.pt,dpo dpo_offline $(LESSON)): runs/%.pt: train_dpo.py runs/sft.pt
	$(TRAIN) train_dpo.py $(FLAGS_$*) --out $@

plots/results.json: evaluate.py plots/figures.py $(MODELS:%=runs/%.pt) $(wildcard runs/*.pt runs/seed*/results.json)
	$(BIN)/python evaluate.py --readme README.md \
		$(if $(wildcard runs/seed*/results.json),--seeds $(wildcard runs/seed*/results.json))

lesson: $(LESSON:%=runs/%.pt)
	$(MAKE) plots/results.json

runs/seed%/sft.pt: train_sft.py model.py data.py | .venv/installed
	$(TRAIN) train_sft.py --seed $* --out $@

runs/seed%/results.json: runs/seed%/sft.pt train_dpo.py evaluate.py
	$(TRAIN) train_dpo.py --seed $* --sft runs/seed$*/sft.pt --out runs/seed$*/dpo.pt
	$(TRAIN) train_dpo.py --seed $* --sft runs/seed$*/sft.pt $(FLAGS_dpo_offline) --out runs/seed$*/dpo_offline.pt
	$(BIN)/python evaluate.py runs/seed$*/*.pt --sft runs/seed$*/sft.pt --seed $* --plots-dir $(@D)

.PRECIOUS: runs/seed%/sft.pt
seeds: $(SEEDS:%=runs/seed%/results.json)
	$(MAKE) plots/results.json

.venv/tests-installed: tests/requirements.txt .venv/installed
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@

test: .venv/tests-installed
	$(BIN)/python -m pytest --quiet

bench: .venv/installed
	$(BIN)/python tests/benchmark.py

clean:
	rm -rf runs

.PHONY: all lesson seeds test bench clean
