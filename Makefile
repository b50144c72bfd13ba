# nacre: `make` lists the targets. Needs a Rust toolchain and make; `make test` and `make demo` as root install what
# else they need with apt.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET_DIR := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
# .cargo/config.toml names the target, so cargo puts its results one directory deeper.
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
NACRE := $(TARGET_DIR)/$(HOST)/release/nacre

.PHONY: help
help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: build
build: ## Build the program: one static binary
	cargo build --release --locked
	@echo "built $(NACRE)"

.PHONY: demo
demo: build ## Build an image, show what came out, build it again from the cache
	@tests/setup/demo.sh "$(NACRE)"

.PHONY: test
test: ## Run all tests: as root and as an ordinary user when started by root
	tests/setup/packages.sh
	cargo test --workspace --locked --no-fail-fast
	tests/setup/as-user.sh
	tests/setup/matrix.sh "$(subst /release/,/debug/,$(NACRE))"

.PHONY: test-matrix
test-matrix: build ## Compare what root, a user with subordinate ids and one without build of apt, npm, pip and more
	tests/setup/packages.sh
	tests/setup/matrix.sh "$(NACRE)"

.PHONY: test-s3
test-s3: ## Check and test caches in buckets (feature s3), against moto's server from PyPI
	tests/setup/packages.sh
	tests/setup/s3.sh
	cargo clippy --workspace --all-targets --locked --features s3 -- -D warnings
	cargo test --locked --features s3 --test it bucket

.PHONY: conformance
conformance: ## Run only the recorded cases; FILTER=^copy picks some
	NACRE_CONFORMANCE_FILTER='$(FILTER)' cargo test --locked --test conformance

.PHONY: lint
lint: ## Check format and lints
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

.PHONY: deny
deny: ## Check licences and advisories (needs cargo-deny)
	cargo deny --config .deny.toml check

.PHONY: clean
clean: ## Remove what was built
	cargo clean
