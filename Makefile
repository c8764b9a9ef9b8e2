# The README's two commands: `make demo` and `make test`.
PYTEST = .venv/bin/python -m pytest

.PHONY: demo test soak lint bench setup-demo setup-test openapi lock clean

setup-demo:
	@tools/setup demo

setup-test:
	@tools/setup test

demo: setup-demo
	@.venv/bin/holloway demo

# Four files at a time, since tests mostly wait: two processors are enough for that. Which never run
# beside each other is said in tests/conftest.py. In one process, for a debugger or a single file:
# make test ARGS="-n 0 tests/unit/test_settings.py"
test: setup-test
	@$(PYTEST) -n 4 --dist loadfile $(ARGS)

# The long form of the random histories, many seeds of each, of calls of the API, of the faults of the
# database, 100,000 malformed packets for the relay, ten minutes of its churn, a thousand messages of
# each foreign client of it, and ten minutes of the simulator's chaos.
soak: setup-test
	@HOLLOWAY_CHAOS_MINUTES=$(or $(MINUTES),10) $(PYTEST) -s --timeout=7200 \
	  tests/simulation/test_chaos_seeds.py
	@HOLLOWAY_MALFORMED=$(or $(PACKETS),100000) $(PYTEST) --timeout=3600 \
	  tests/unit/relays/test_malformed.py
	@HOLLOWAY_ALL_HABITS=1 $(PYTEST) --timeout=3600 tests/system/test_kernel_hostile.py
	@HOLLOWAY_RELAY_SOAK_MINUTES=$(or $(MINUTES),10) $(PYTEST) -s -n 0 \
	  tests/system/test_relay_soak.py
	@HOLLOWAY_SCHEMATHESIS_EXAMPLES=100 $(PYTEST) --timeout=7200 \
	  tests/system/test_portal_api_described.py
	@HOLLOWAY_CHAOS_SEEDS=$(or $(SEEDS),300) $(PYTEST) --timeout=3600 \
	  tests/unit/actors/test_cluster_chaos.py tests/unit/runtime_cluster/test_keyed_chaos.py
	@HOLLOWAY_DRAIN_FUZZ_S=$(or $(SECONDS),600) $(PYTEST) --timeout=7200 \
	  tests/system/test_relay_drain_sanitized.py
	@HOLLOWAY_DATABASE_FAULTS=$(or $(TIMES),6) $(PYTEST) --timeout=3600 \
	  tests/system/test_database_faults.py
	@HOLLOWAY_MODEL_HISTORIES=$(or $(SEEDS),100) $(PYTEST) --timeout=7200 \
	  tests/system/test_control_model.py
	@HOLLOWAY_FOREIGN_MESSAGES=$(or $(MESSAGES),1000) $(PYTEST) --timeout=3600 \
	  tests/system/test_relay_foreign.py tests/system/test_relay_streams.py \
	  tests/system/test_relay_webrtc.py -k "lose_nothing or over_tcp_and_tls or pions"

lint: setup-test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

bench: setup-test
	@set -e; for file in benchmarks/[a-z]*.py; do \
	  .venv/bin/python -m benchmarks.$$(basename $$file .py) $(ARGS); done

# Renews the description of the API that `holloway admin` carries; commit the result.
openapi: setup-test
	@.venv/bin/python tools/openapi > admin/openapi.json.new
	@mv admin/openapi.json.new admin/openapi.json

# Pins every dependency anew; run by hand, then commit the result.
lock: setup-test
	@.venv/bin/pip install --quiet uv
	@.venv/bin/uv pip compile pyproject.toml --extra portal --extra dev --generate-hashes \
	  --no-emit-index-url --no-annotate --no-header --universal --python-version 3.11 \
	  --upgrade -o requirements.lock -q

clean:
	@rm -rf .venv build/foreign .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
