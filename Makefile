# What .ci/run and a developer run, nothing else. Tools come from the [test] extra.
.PHONY: format check test test-slow

format:
	ruff check --fix src tests
	ruff format src tests

check:
	ruff check src tests
	ruff format --check src tests
	pyright
	lint-imports

test:
	pytest

test-slow:
	pytest -m "slow or not slow"
