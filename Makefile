# make demo | test | lint | docs | gpu | sanitize | clean. Everything is installed into .venv; nothing else on the machine is touched.
# Already have torch? `make gpu RUN=python3` uses that interpreter and installs nothing.

PYTHON ?= python3
VENV ?= .venv
RUN ?= $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed

# With a GPU: the newest supported torch, with the Triton it was built for. Without: a CPU build, from PyTorch's own index
# where that can be reached (PyPI's Linux wheel brings gigabytes of CUDA).
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH ?= $(if $(HAS_GPU),torch>=2.11$(comma)<2.16,torch==2.13.0)
CPU_INDEX := https://download.pytorch.org/whl/cpu
REACHABLE = $(PYTHON) -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=5)" >/dev/null 2>&1
comma := ,

OURS := $(filter $(VENV)/%,$(RUN))
NEEDS_INSTALL := $(if $(OURS),$(INSTALLED))
NEEDS_TOOLS := $(if $(OURS),$(DEVELOPED))

.PHONY: demo test lint docs gpu sanitize install clean

demo: $(NEEDS_INSTALL)
	$(RUN) -m benchmarks.demo

test: $(NEEDS_TOOLS)
	$(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(NEEDS_TOOLS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# docs/results.md, the pictures and README's tables, from benchmarks/results/ and the code.
docs: $(NEEDS_TOOLS)
	$(RUN) -m benchmarks.results_page
	$(RUN) -m benchmarks.weight_to_kernel

# Tests and benchmarks that need a GPU, in one go; the numbers go to benchmarks/results/. Most of the tests' time is
# compilation: make gpu PYTEST_ADDOPTS="-n 8" is several times faster. Not the quality study, which needs texts.
gpu: $(NEEDS_TOOLS)
	$(RUN) -m pytest -m "gpu or not gpu" tests/gpu tests/test_reference_kernel.py tests/test_packed.py \
		tests/test_formats.py tests/test_expand.py
	$(RUN) -m benchmarks.agreement
	$(RUN) -m benchmarks.decode
	$(RUN) -m benchmarks.prefill || test $$? -eq 2  # 2: not on this GPU, the others go on
	$(RUN) -m benchmarks.pick_quality
	$(RUN) -m benchmarks.compile_time
	$(RUN) -m benchmarks.learning_cost
	$(RUN) -m benchmarks.one_shot_cost
	$(RUN) -m benchmarks.load_time
	$(RUN) -m benchmarks.soak
	$(RUN) -m benchmarks.step_profile
	$(RUN) -m patch_compiler.bench llama-2-7b --batch 16 --long-prompt 2048 --sparsity 0.25,0.35,0.45 --dense inductor \
		--output "$$($(RUN) -c 'from benchmarks.results_file import results_file as f; print(f("bench-llama-2-7b"))')"

# The decode kernels under compute-sanitizer (which comes with CUDA). API errors are not reported: Triton's launcher tries an
# attribute that older drivers refuse, and goes on without it.
sanitize: $(NEEDS_TOOLS)
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(RUN) -m tests.gpu.sanitized
	$(RUN) -m tests.gpu.racecheck

install: $(DEVELOPED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(if $(HAS_GPU),,if $(REACHABLE); then index="--index-url $(CPU_INDEX)"; fi;) \
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check $$index "$(TORCH)"
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[gguf]"
	touch $@

# Apart, so that the demo is there soon, without a hundred packages that it does not use.
$(DEVELOPED): $(INSTALLED)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[gguf,hub,eval,test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
