# Go, Node and make are all that has to be there; on Debian what else a target needs it installs.

MAJORS ?= 12 13 14 15 16 17 18
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)

STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOFUMPT = mvdan.cc/gofumpt@v0.12.0

# The race detector needs a C compiler.
RACE = $(if $(shell command -v gcc cc 2>/dev/null),-race)

.DEFAULT_GOAL = help

.PHONY: help
help: ## What there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## bin/sequin
	CGO_ENABLED=0 go build -trimpath -ldflags '$(if $(VERSION),-X main.version=$(VERSION))' -o bin/sequin ./cmd/sequin

.PHONY: demo
demo: server ## A story told on a server of its own: every statement with its result
	@go run ./tests/demo

.PHONY: test
test: deps ## The tests, on the PostgreSQL that is installed
	go vet ./...
	go test $(RACE) ./bridge/...
	go test -count=1 -timeout 30m ./cmd/... ./tests/...

.PHONY: test-all
test-all: deps ## The tests, on each major version of PostgreSQL: MAJORS="12 18" for some
	go vet ./...
	@failed=; skipped=; \
	for major in $(MAJORS); do \
	  echo "PostgreSQL $$major"; \
	  if ! tests/setup/postgres.sh $$major; then skipped="$$skipped $$major"; continue; fi; \
	  PGTEST_MAJOR=$$major go test -count=1 -timeout 30m ./... || failed="$$failed $$major"; \
	done; \
	[ -z "$$skipped" ] || echo "skipped, for there is none to be had:$$skipped"; \
	[ -z "$$failed" ] || { echo "failed on:$$failed"; exit 1; }

.PHONY: race
race: deps ## The tests, with the race detector
	go test -race -count=1 ./...

.PHONY: test-faults
test-faults: server ## The bridge and the server killed, again and again
	SEQUIN_ROUNDS=$${SEQUIN_ROUNDS:-50} go test -count=1 -timeout 2h -v ./tests/faults

.PHONY: bench
bench: server ## The benchmark: lines of name, value and unit. ARGS="-run delivery" for some
	go run ./tests/bench $(ARGS)

.PHONY: lint
lint: ## vet, staticcheck, gofumpt, shellcheck
	go vet ./...
	go run $(STATICCHECK) ./...
	@unformatted=$$(go run $(GOFUMPT) -l .); [ -z "$$unformatted" ] || { echo "not as gofumpt has it:"; echo "$$unformatted"; exit 1; }
	@if command -v shellcheck >/dev/null; then shellcheck .ci/run tests/setup/*.sh; else echo "shellcheck is not installed: the scripts are not looked at"; fi

.PHONY: verify
verify: lint ## lint, and that go.mod is what the imports need
	go mod tidy -diff
	go mod verify

.PHONY: clean
clean: ## Removes what was built and fetched
	rm -rf bin .cache

.PHONY: server deps
server:
	@tests/setup/deps.sh

deps:
	@tests/setup/deps.sh --drivers
