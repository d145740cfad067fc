# Everything a newcomer types. `make up` and `make test` do their own set-up.
.PHONY: up test build mlx lint bench bench-messages clean

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
bench: build
	@test -x $(BENCH)/bin/python || python3 -m venv $(BENCH)
	@$(BENCH)/bin/python -c 'import mlx_lm' 2>/dev/null || $(BENCH)/bin/pip install --quiet $(MLX_LM)
	target/release/offbook bench decode --python $(BENCH)/bin/python

# Asks and tells beside kameo's and ractor_cluster's; needs no MLX.
bench-messages: require-cargo
	$(CARGO) run --release --locked --manifest-path runtime/benches/peers/Cargo.toml

clean:
	$(CARGO) clean
	rm -rf .mlx .cargo/config.toml

.PHONY: require-cargo
require-cargo:
	@command -v $(CARGO) >/dev/null || { echo "missing: cargo (https://rustup.rs)"; exit 1; }
