# Everything a newcomer types. `make up` and `make test` do their own set-up.
.PHONY: up test build mlx lint bench clean

CARGO ?= cargo
# cpu or cuda-13; on macOS mlx-sys builds MLX itself and this does nothing.
MLX ?= cpu
MLX_LINUX = deploy/mlx-linux

up: build
	target/release/offbook up

build: mlx
	$(CARGO) build --release --locked

test: mlx lint
	$(CARGO) test --workspace --locked

mlx: require-cargo
	@$(CARGO) run --quiet --locked --manifest-path $(MLX_LINUX)/Cargo.toml -- $(MLX)

lint: mlx
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) fmt --check --manifest-path $(MLX_LINUX)/Cargo.toml
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
	  $(CARGO) deny --offline --log-level error check bans licenses sources; \
	else echo "lint: cargo-deny is not installed (cargo install cargo-deny), licences not checked"; fi

bench: build
	target/release/offbook bench decode

clean:
	$(CARGO) clean
	rm -rf .mlx .cargo/config.toml

.PHONY: require-cargo
require-cargo:
	@command -v $(CARGO) >/dev/null || { echo "missing: cargo (https://rustup.rs)"; exit 1; }
