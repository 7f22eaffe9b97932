# From a fresh clone: `make demo` or `make test`. Needs Python 3.11+, gcc and make; the rest is fetched.
VENV := .venv
PY := $(VENV)/bin/python
SYSTEM_PYTHON ?= python3
NATIVE := tuimig/core/native
CSOURCES := $(filter-out $(NATIVE)/_engine.c,$(wildcard $(NATIVE)/*.c))
CSOURCES_FUZZ := $(addprefix $(NATIVE)/,stream.c arrival.c pack.c spool.c checksum.c error.c)
CFILES := $(CSOURCES) $(wildcard $(NATIVE)/*.h) $(wildcard tests/native/*.[ch]) $(wildcard tests/programs/*.[ch])
CWARN := -std=gnu11 -O2 -msse4.2 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wconversion -Werror
# program:package pairs that the tests use
TOOLS := redis-server:redis-server redis-benchmark:redis-tools memcached:memcached \
	clang-format:clang-format sshd:openssh-server ssh:openssh-client ip:iproute2 nginx:nginx-light node:nodejs chromium:chromium \
	zsh:zsh fish:fish groff:groff-base

.PHONY: all venv build demo test check lint sanitize asan tsan fuzz bench soak packages clean
all: build

venv: $(VENV)/.ready
build: $(VENV)/.built

$(VENV)/.ready: pyproject.toml
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "tuimig needs Python 3.11 or newer; set SYSTEM_PYTHON=/path/to/python3"; exit 1; }
	@SYSTEM_PYTHON=$(SYSTEM_PYTHON) ./.ci/packages gcc:gcc
	test -x $(PY) || $(SYSTEM_PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "setuptools>=68,<81" wheel "cffi>=1.16"
	touch $@

# An editable install builds the engine and tuimig-init inside the tree.
$(VENV)/.built: $(VENV)/.ready setup.py $(NATIVE)/build.py $(CSOURCES) $(wildcard $(NATIVE)/*.h)
	$(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	touch $@

packages:
	@SYSTEM_PYTHON=$(SYSTEM_PYTHON) ./.ci/packages $(TOOLS)

demo: build
	$(VENV)/bin/tuimig demo

test: packages build lint sanitize check

# Two at a time: most tests wait for processes rather than compute. They start the command a thousand times, which where
# PYTHONDONTWRITEBYTECODE is set would compile it each time.
check: build
	$(PY) -m compileall -q tuimig
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not soak"

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	clang-format --dry-run -Werror $(CFILES)
	printf '%s\n' $(CSOURCES) | xargs -P 2 -I{} gcc $(CWARN) -I$(NATIVE) -c -o /dev/null {}

# The same programs run without sanitizers in `make check`.
sanitize: packages
	@$(MAKE) --no-print-directory --output-sync=target -j 2 asan tsan
asan tsan:
	tests/native/run.sh $@

# Coverage-guided, on the parser of page streams; nothing is found in FUZZ_SECONDS, or the input is kept and shown.
FUZZ_SECONDS ?= 3600
fuzz:
	@./.ci/packages clang:clang clang:libclang-rt-14-dev
	mkdir -p build/fuzz/corpus
	clang -std=gnu11 -O1 -g -msse4.2 -D_GNU_SOURCE -pthread -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
		-I$(NATIVE) -o build/fuzz/stream tests/native/fuzz_stream.c $(CSOURCES_FUZZ)
	cd build/fuzz && ./stream -max_total_time=$(FUZZ_SECONDS) -max_len=70000 -len_control=20 corpus

bench: build
	@for program in freeze fault capture restore impact console remote; do \
		echo "== benchmarks/$$program.py"; $(PY) benchmarks/$$program.py || exit 1; done

soak: build
	$(PY) -m pytest -q -m "slow or soak" --timeout 3600

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f $(NATIVE)/_engine.c $(NATIVE)/*.so $(NATIVE)/tuimig-init $(NATIVE)/*.o
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
