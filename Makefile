# make search   from nothing to a finished search on the embedded data set
# make test     from nothing to green tests
# Both install into .venv first, once; `make help` lists the rest.

PYTHON ?= python3
BIN := .venv/bin
# Two tests at a time: most of them use one core. Of the proofs, one on Slurm and one other: two Slurms on one machine
# would share node names and job numbers.
WORKERS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: help install search test check proofs proofs-slurm proofs-others proofs-torch long clean

help:
	@echo "make search    install, prepare the digits, train a float network, search quantized ones from it"
	@echo "make test      install, then 'make check'"
	@echo "make check     ruff, mypy and the tests (without the long proofs)"
	@echo "make proofs    the long proofs, and the tests of quantization with the oldest supported torch"
	@echo "make long      more of the same, for a quiet hour"
	@echo "make install   .venv with the project and its pinned versions; ffcv where it can be built"
	@echo "make clean     remove .venv and what 'make search' made"

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt data_prep/install_ffcv.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "installing into .venv (some minutes: torch alone is several GB)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[train,search,digits,dev]'
	sh data_prep/install_ffcv.sh $(BIN)/pip
	@touch $@

search: .venv/installed
	$(BIN)/python -m data_prep digits --out data/digits
	$(BIN)/python -m nulsq.train configs/recipes/digits/float.yaml
	$(BIN)/python -m tune.search configs/search/demo.yaml

test: .venv/installed check

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20 \
		-m "not slow and not slurm and not long"

proofs: .venv/installed
	$(MAKE) --no-print-directory -j2 --output-sync=line proofs-slurm proofs-others
	$(MAKE) --no-print-directory proofs-torch

proofs-slurm:
	$(BIN)/python -m pytest --durations 20 -m "slurm and not long" || [ $$? -eq 5 ]

proofs-others:
	$(BIN)/python -m pytest --durations 20 -m "slow and not slurm and not long" || [ $$? -eq 5 ]

# The oldest torch that setup.cfg allows, with the libraries that belong to it.
OLD := .venv-torch2.11
OLD_PACKAGES := torch==2.11.0 torchvision==0.26.0 timm pytorchcv omegaconf numpy pyyaml pillow safetensors \
	scikit-learn tqdm hypothesis pytest pytest-timeout pytest-xdist

$(OLD)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(OLD)
	grep -vE '^torch(vision)?==' constraints.txt > $(OLD)/constraints.txt
	$(OLD)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLD)/constraints.txt $(OLD_PACKAGES)
	@touch $@

proofs-torch: $(OLD)/installed
	$(OLD)/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations 5 -m "quant and not slow and not long"

long: .venv/installed
	$(BIN)/python -m pytest --timeout 3600 -m long

clean:
	rm -rf .venv $(OLD) data/digits runs/digits-float-0 runs/search-demo
