# Two commands matter: `make demo` and `make test`. Each makes what it needs: .venv from the lock, the two servers, the data.
REPRO := .venv/bin/repro
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
export DAGSTER_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
# Many images forbid Python to keep compiled modules: then every rank and every run compiles PyTorch anew, 10 s of CPU time at each start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test dev down lint lock clean environment servers

help:
	@echo "make demo   the whole story on generated data: three snapshots, two releases, one refusal, one certificate"
	@echo "make test   the whole test suite"
	@echo "make dev    the Dagster UI, its daemon and the servers, until Ctrl-C"
	@echo "make down   stop the servers          make lint   ruff and mypy"
	@echo "make lock   lock all packages again   make clean  remove .venv and .repro"

# The servers are built by the system's Python while the environment installs: on a bare machine both take minutes.
environment:
	@sh deploy/environment.sh

servers:
	@sh deploy/both.sh

demo: servers
	@$(REPRO) demo

dev: servers
	@$(REPRO) dev

test: servers
	@.venv/bin/python -m repro_assets_tests.side_by_side repro_assets_tests

down:
	@$(REPRO) down

lint: environment
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

lock:
	@sh deploy/lock.sh

clean:
	@[ ! -x $(REPRO) ] || $(REPRO) down || true
	rm -rf .venv .repro build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis test-artifacts
