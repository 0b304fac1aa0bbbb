# Everything a newcomer needs is `make demo` and `make test`. Each target does its own set-up, once.
#   HOST_VERSION=0.16.3   another supported ComfyUI        COMFYUI_DIR=/path   a ComfyUI of your own
#   PYTHON=python3.12     the Python to set up with        ARGS="..."          further arguments for a target
PYTHON ?= python3
RUN := .venv/bin/python -m lcm_lookahead
export HOST_VERSION COMFYUI_DIR PORT
# Many short processes import torch: without byte code each would compile it again, for ten seconds. It lies in this
# folder, beside its source.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup host demo page test portable matrix browser evaluate bench lint clean
.DEFAULT_GOAL := help

help: ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: ## make the environment in .venv (about a minute)
	@$(PYTHON) -m tools.start $(ARGS)

host: ## fetch the pinned ComfyUI into .host
	@$(PYTHON) -m tools.start
	@$(RUN).host.fetch $(ARGS)

demo: ## draw reference faces under new prompts in a real ComfyUI
	@$(PYTHON) -m tools.start
	@$(RUN).mini.demo $(ARGS)

page: ## open ComfyUI with the mini world and its faces in your browser
	@$(PYTHON) -m tools.start
	@$(RUN).mini.page $(ARGS)

test: ## lint, types and the tests, on the newest ComfyUI and, where versions differ, on the oldest
	@$(PYTHON) -m tools.start
	@$(RUN).tools.testing $(ARGS)

portable: ## the tests as on other processors, with one and two threads; on this one the slow tests too (about two hours; ARGS="--processor avx2": one of them)
	@$(PYTHON) -m tools.start
	@$(RUN).tools.testing --portable $(ARGS)

matrix: ## every host test on every supported ComfyUI
	@$(PYTHON) -m tools.start
	@$(RUN).tools.testing --matrix $(ARGS)

browser: ## the workflows and help pages in ComfyUI's own web page (needs Chromium; ARGS="-- -m slow": every template run, and as app)
	@$(PYTHON) -m tools.start
	@$(RUN).tools.testing --browser $(ARGS)

evaluate: ## measure image prompt, KV injection and guidance over held-out references
	@$(PYTHON) -m tools.start
	@$(RUN).cli.main evaluate $(ARGS)

bench: ## the performance tables
	@$(PYTHON) -m tools.start
	@$(RUN).tools.bench $(ARGS)

lint: ## lint and types alone
	@$(PYTHON) -m tools.start
	@$(RUN).tools.testing --lint $(ARGS)

clean: ## remove what the tools have made, but not .venv and .host
	@rm -rf .cache output build dist *.egg-info .ruff_cache .pytest_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -not -path './.host/*' -prune -exec rm -rf {} +
