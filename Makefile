# What .ci/run and a developer run, nothing else. Tools come from the [test] extra.
.PHONY: format check test test-slow bench

format:
	ruff check --fix src tests benchmarks
	ruff format src tests benchmarks

check:
	ruff check src tests benchmarks
	ruff format --check src tests benchmarks
	pyright
	lint-imports

test:
	pytest

test-slow:
	pytest -m "slow or not slow"

# Half an hour on a quiet machine; `python benchmarks/speed.py --quick` sees in minutes that all of it runs.
bench:
	python benchmarks/speed.py
