package pgtest

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Seed returns the seed of a random test: SEQUIN_SEED repeats one.
func Seed(t testing.TB) uint64 {
	t.Helper()
	if text := os.Getenv("SEQUIN_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("SEQUIN_SEED: %v", err)
		}
		return seed
	}
	seed := rand.Uint64() >> 32
	t.Logf("SEQUIN_SEED=%d", seed) // however the test ends
	return seed
}

// Rounds returns how often a random test repeats itself: SEQUIN_ROUNDS, or else a few.
func Rounds(t testing.TB, few int) int {
	t.Helper()
	text := os.Getenv("SEQUIN_ROUNDS")
	if text == "" {
		return few
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("SEQUIN_ROUNDS: %v", err)
	}
	return n
}
