# make book    run every chapter and render the book; prints the path of its first page
# make test    check everything: package, models, chapters, pages, tooling
# make torture kill the commands 500 times at random moments, where make test does so 50 times
# make bench   time the probe and the training against plain references: build/bench.json
# make house   draw the picture of the packages in CONTRIBUTING.md from their imports
# make dist    wheel and sdist in build/dist, each installed and tried in an environment of its own
# make clean   remove what was built; .venv, node_modules and the download cache stay
#
# PROFILE=paper runs the paper's own sizes (one GPU); JOBS is how many chapters run at once.

PROFILE ?= quick
JOBS    ?= 2
PYTHON  ?= python3

bin := .venv/bin
# Under LC_ALL=C Python cannot start from an environment whose path has an accent in it.
ifneq ($(filter C POSIX,$(LC_ALL)),)
export LC_ALL := C.UTF-8
endif
# Several processes share the cores, so each computes on one.
export OMP_NUM_THREADS ?= 1
# glibc keeps the memory that tensors free, rather than ask for it anew at every step.
export MALLOC_MMAP_THRESHOLD_ ?= 268435456
export MALLOC_TRIM_THRESHOLD_ ?= 536870912

.PHONY: book test torture bench house dist clean

book: .venv/installed
	$(bin)/sinkbook build --profile $(PROFILE) --jobs $(JOBS)

test: .venv/installed
	$(bin)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder

torture: .venv/installed
	SINKBOOK_KILLS=500 $(bin)/python -m pytest -n 0 tests/faults/test_kills.py

bench: .venv/installed
	$(bin)/python -m benchmarks

house: .venv/installed
	$(bin)/python -m tests.house

dist: .venv/installed
	PYTHON=$(PYTHON) tests/dist.sh

clean:
	rm -rf build

# torch comes first and alone, so that a CPU build that pip finds is kept by all that follows.
.venv/installed: pyproject.toml constraints.txt
	test -x $(bin)/python || $(PYTHON) -m venv .venv
	$(bin)/pip install --quiet --constraint constraints.txt torch
	$(bin)/pip install --quiet --constraint constraints.txt --editable '.[book,test]'
	touch $@
