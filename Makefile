# make        everything: .venv, SFT, online and offline DPO, tables and figures in plots/
# make test   the tests
# make clean  forget the trained models (.venv stays)

PYTHON ?= python3
BIN := .venv/bin

all: plots/results.json

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

runs/sft.pt: train_sft.py model.py data.py | .venv/installed
	$(BIN)/python train_sft.py

runs/dpo.pt: train_dpo.py runs/sft.pt
	$(BIN)/python train_dpo.py

runs/dpo_offline.pt: train_dpo.py runs/sft.pt
	$(BIN)/python train_dpo.py --pairs offline --out $@

plots/results.json: evaluate.py plots/figures.py runs/sft.pt runs/dpo.pt runs/dpo_offline.pt
	$(BIN)/python evaluate.py runs/sft.pt runs/dpo_offline.pt runs/dpo.pt

.venv/tests-installed: tests/requirements.txt .venv/installed
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@

test: .venv/tests-installed
	$(BIN)/python -m pytest --quiet

clean:
	rm -rf runs

.PHONY: all test clean
