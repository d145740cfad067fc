# Everything a newcomer types. `make up` and `make test` do their own set-up.
.PHONY: up test build mlx lint bench bench-serve bench-messages clean

CARGO ?= cargo
# cpu or cuda-13; on macOS mlx-sys builds MLX itself and this does nothing.
MLX ?= cpu
MLX_LINUX = deploy/mlx-linux
BENCH = .mlx/bench
MLX_LM = mlx-lm==0.32.2 $(if $(filter Darwin,$(shell uname)),mlx==0.32.4,mlx[cpu]==0.32.4)

up: build
	target/release/offbook up

build: mlx
	$(CARGO) build --release --locked

test: mlx lint
	$(CARGO) test --workspace --locked

mlx: require-cargo
	@test "$$(uname)" = Darwin || $(CARGO) run --quiet --locked --manifest-path $(MLX_LINUX)/Cargo.toml -- $(MLX)

lint: mlx
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@for alone in $(MLX_LINUX) runtime/benches/peers runtime/fuzz; do \
	  echo "$(CARGO) fmt --check --manifest-path $$alone/Cargo.toml"; \
	  $(CARGO) fmt --check --manifest-path $$alone/Cargo.toml || exit 1; done
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
	  $(CARGO) deny --offline --log-level error check bans licenses sources; \
	else echo "lint: cargo-deny is not installed (cargo install cargo-deny), licences not checked"; fi

# Beside mlx-lm, which this sets up in a Python environment of its own.
bench: build $(BENCH)/bin/mlx_lm
	target/release/offbook bench decode --python $(BENCH)/bin/python

# Beside mlx-lm's server: with the demo model, then with one of random weights that is wider.
bench-serve: build $(BENCH)/bin/mlx_lm
	deploy/bench/serve.sh $(BENCH)/bin/python
	@test -e .mlx/wide-model/config.json || $(BENCH)/bin/python deploy/bench/wide_model.py .mlx/wide-model
	deploy/bench/serve.sh $(BENCH)/bin/python $(CURDIR)/.mlx/wide-model

$(BENCH)/bin/mlx_lm:
	python3 -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet $(MLX_LM)

# Asks and tells beside kameo's and ractor_cluster's; needs no MLX.
bench-messages: require-cargo
	$(CARGO) run --release --locked --manifest-path runtime/benches/peers/Cargo.toml

clean:
	$(CARGO) clean
	rm -rf .mlx .cargo/config.toml

.PHONY: require-cargo
require-cargo:
	@command -v $(CARGO) >/dev/null || { echo "missing: cargo (https://rustup.rs)"; exit 1; }
