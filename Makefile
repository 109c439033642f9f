# Every target sets itself up: `make test` on a fresh clone is enough. Needs Python 3.10-3.14 with pip.
PYTHON ?= python3
CONFIG ?= quick.yaml
DATASET ?=
THREADS ?=
JOBS ?=
SHORT ?=
CODECS ?=
METRICS ?=
LESSONS ?=
PORT ?=
LMBDAS ?=
STAGE ?=
RUNS ?=
WORKERS ?= 2
TORCH ?=
UV ?=
PUBLISH ?=

VENV := .venv
STAMP := $(VENV)/.stamp
DEV := $(VENV)/.stamp-dev
JUPYTER := $(VENV)/.stamp-notebooks
GRADIO := $(VENV)/.stamp-demo
PY := $(VENV)/bin/python
# Every folder with a model.py and a train.py is a paper (common/papers.py).
PAPERS := $(patsubst %/model.py,%,$(wildcard $(patsubst %/train.py,%/model.py,$(wildcard */train.py))))

ABLATIONS := $(patsubst %/ablate.py,%,$(wildcard */ablate.py))

.DEFAULT_GOAL := help
.PHONY: help setup test lint torture fuzz bench compare claims curves demo notebooks clean weights $(ABLATIONS:%=ablate-%) \
    $(PAPERS:%=reproduce-%) $(PAPERS:%=weights-%) $(PAPERS:%=sweep-%) $(PAPERS:%=report-%)

help:
	@echo "make setup              make $(VENV) and install the pinned packages (the others do it too)"
	@echo "                        TORCH=cpu takes PyTorch's CPU build (0.2 GB, not 2.9 GB); UV=1 uses uv"
	@echo "make test               run every test, in WORKERS=2 processes of one thread each"
	@echo "make lint               ruff (style) and mypy (types); both install their tools first"
	@echo "make reproduce-PAPER    train, code the 24 Kodak images, table and plot; PAPER is one of:"
	@echo "                            $(PAPERS)"
	@echo "                        CONFIG=config.yaml DATASET=/path runs the paper's own recipe"
	@echo "make weights-PAPER      train, export and evaluate the weights that PAPER bundles (hours), as"
	@echo "                        its weights.yaml says; an interrupted call goes on where it was"
	@echo "make weights            those of all papers, the one with the least work first"
	@echo "                        DATASET=/path (a folder, a .tar, or a quoted '/path/*.tar') THREADS=2"
	@echo "                        JOBS=2 (stages at once); SHORT=1 tries it all in a minute or two"
	@echo "make sweep-PAPER LMBDAS='0.0035 0.013'    train PAPER at these values of lmbda by its"
	@echo "                        weights.yaml, and write results/sweep.json and plot (hours; SHORT=1)"
	@echo "make report-PAPER       evaluate the bundled weights of PAPER; write results/, pictures, table rows"
	@echo "make ablate-PAPER       train the rows of its table of variants at equal steps, write results/"
	@echo "                        and the table (hours); PAPER is one of: $(ABLATIONS)"
	@echo "make compare            all papers, classical codecs and published curves: table, plot and page;"
	@echo "                        DATASET=/path compares on other images, CODECS=all also HEVC and VVC,"
	@echo "                        METRICS=all (or vif,fsim,gmsd,haarpsi,mdsi) further metrics, by piq"
	@echo "make claims             what the papers claim, beside what equal trainings of ours show;"
	@echo "                        PUBLISH=1 also writes it to RESULTS.md"
	@echo "make curves RUNS='hyperprior/logs/quick/0 joint_ar/logs/quick/0'    curves of training runs as a"
	@echo "                        plot and as a page, with their flags and hardware: curves.png, curves.html"
	@echo "make demo               a page in the browser that codes your images with the bundled weights;"
	@echo "                        PORT=8000 chooses its port (installs Gradio into $(VENV))"
	@echo "make notebooks          install Jupyter into $(VENV); execute the lessons in lessons/, as notebooks"
	@echo "                        and HTML pages; LESSONS='3 6' chooses some; SHORT=1 tries it all"
	@echo "make torture            kill a training of each paper 20 times; it must end as if nothing happened"
	@echo "make fuzz               decode 100,000 mutated files, load 500 malformed checkpoints (ten minutes);"
	@echo "                        each must end in an error of one line, or in an image"
	@echo "make bench              measure training and coding speed, write the ratios to bench.json"
	@echo "make clean              remove $(VENV) and caches"
	@echo "PYTHON=python3.12 chooses the interpreter that $(VENV) is made with."

setup: $(STAMP)

# The stamps are written last, so an interrupted installation is taken up by the next `make`. After
# an upgrade of Python or a move of this folder: `make clean`. Any Python can run the first line.
INSTALL = $(PYTHON) common/install.py $(if $(filter-out 0,$(UV)),--uv)

$(STAMP): requirements.txt requirements-nodeps.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null || \
	    { echo "error: '$(PYTHON)' is not Python 3.10 to 3.14; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(INSTALL) $(if $(TORCH),--torch '$(TORCH)')
	@touch $@

$(DEV): $(STAMP) $(GRADIO) requirements-dev.txt
	@$(INSTALL) --dev
	@touch $@

test: $(DEV)
	$(PY) -m pytest tests -q --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m mypy

# For targets that change the folder first; DATASET may be a glob, in names of folders, too.
REALPATH = $(PY) -c 'import os, sys; os.write(1, os.fsencode(os.path.realpath(sys.argv[1])))'

$(ABLATIONS:%=ablate-%): ablate-%: $(STAMP)
	$(if $(DATASET),data=$$($(REALPATH) "$(DATASET)") && )cd $* && ../$(PY) ablate.py --publish \
	    $(if $(DATASET),--dataset "$$data") $(if $(THREADS),--threads $(THREADS))

torture: $(DEV)
	$(PY) tests/torture.py $(PAPERS)

fuzz: $(DEV)
	$(PY) tests/fuzz.py --jobs $(WORKERS)

bench: $(STAMP)
	$(PY) -m common.evaluation.bench $(PAPERS) --results bench.json

$(JUPYTER): $(STAMP) requirements-notebooks.txt
	@$(INSTALL) --notebooks
	@touch $@

notebooks: $(JUPYTER)
	@SHORT=$(SHORT) $(PY) lessons/build.py $(LESSONS)

claims: $(STAMP)
	$(PY) -m common.comparison.claims $(if $(filter-out 0,$(PUBLISH)),--publish)

$(GRADIO): $(STAMP) requirements-demo.txt
	@$(INSTALL) --demo
	@touch $@

demo: $(GRADIO)
	$(PY) -m common.demo $(if $(PORT),--port $(PORT)) $(if $(THREADS),--threads $(THREADS))

compare: $(STAMP)
	$(PY) -m common.comparison $(if $(DATASET),--dataset "$(DATASET)") \
	    $(if $(CODECS),--codecs $(CODECS)) $(if $(METRICS),--metrics "$(METRICS)") \
	    $(if $(THREADS),--threads $(THREADS))

curves: $(STAMP)
	@[ -n "$(RUNS)" ] || { echo 'error: name log folders: make $@ RUNS="hyperprior/logs/quick/0"' >&2; exit 2; }
	$(PY) -m common.evaluation.curves $(RUNS) --plot curves.png --html curves.html

# --resume auto takes up a run that was interrupted; --reproduce codes Kodak with the weights just
# trained and with the bundled ones, prints both beside the published numbers, and ends with what was
# trained and whether it is as expected.
$(PAPERS:%=reproduce-%): reproduce-%: $(STAMP)
	$(if $(DATASET),data=$$($(REALPATH) "$(DATASET)") && )cd $* && \
	    ../$(PY) train.py --config $(CONFIG) --resume auto $(if $(DATASET),--dataset "$$data")
	cd $* && ../$(PY) eval.py --reproduce --config $(CONFIG)

# What is long runs at the lowest priority.
WEIGHTS = $(PY) -m common.recipes.weights $(if $(DATASET),--dataset "$(DATASET)") \
    $(if $(THREADS),--threads $(THREADS)) $(if $(JOBS),--jobs $(JOBS)) $(if $(SHORT),--short)

weights: $(STAMP)
	$(WEIGHTS)

$(PAPERS:%=weights-%): weights-%: $(STAMP)
	$(WEIGHTS) $*

$(PAPERS:%=sweep-%): sweep-%: $(STAMP)
	@[ -n "$(LMBDAS)" ] || { echo 'error: name the points: make $@ LMBDAS="0.0035 0.013"' >&2; exit 2; }
	$(PY) -m common.recipes.sweep $* $(LMBDAS) $(if $(STAGE),--stage "$(STAGE)") \
	    $(if $(DATASET),--dataset "$(DATASET)") $(if $(THREADS),--threads $(THREADS)) \
	    $(if $(JOBS),--jobs $(JOBS)) $(if $(SHORT),--short)

$(PAPERS:%=report-%): report-%: $(STAMP)
	$(PY) -m common.recipes.report $* $(if $(THREADS),--threads $(THREADS))

reproduce-% weights-% sweep-% report-%:
	@echo "error: no paper '$*'; choose from: $(PAPERS)" >&2; exit 2

ablate-%:
	@echo "error: no ablate.py in '$*'; choose from: $(ABLATIONS)" >&2; exit 2

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
