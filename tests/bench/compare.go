package main

import (
	"context"
	"fmt"
	"slices"
)

// side is one of two that are measured in turn.
type side struct {
	name string
	rate func(context.Context) (float64, error) // one measurement, its preparation not counted
}

// compare measures both sides in turn, round after round, now one first and now the other, and prints the median of
// the rounds' ratios and both medians.
func (b *bench) compare(ctx context.Context, name, unit string, ours, baseline side) error {
	return b.compareOn(ctx, name, unit, func(context.Context) error { return nil }, ours, baseline)
}

// compareOn is compare, with work that is prepared for both sides before each round.
func (b *bench) compareOn(
	ctx context.Context, name, unit string, prepare func(context.Context) error, ours, baseline side,
) error {
	var a, c, ratios []float64
	for round := range b.rounds {
		if err := prepare(ctx); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		sides := []side{ours, baseline}
		if round%2 == 1 {
			slices.Reverse(sides)
		}
		rates := map[string]float64{}
		for _, s := range sides {
			rate, err := s.rate(ctx)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, s.name, err)
			}
			rates[s.name] = rate
		}
		a = append(a, rates[ours.name])
		c = append(c, rates[baseline.name])
		ratios = append(ratios, rates[ours.name]/rates[baseline.name])
	}
	print(name, median(ratios), "x")
	print(name+"."+ours.name, median(a), unit)
	print(name+"."+baseline.name, median(c), unit)
	return nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}

// print prints a figure.
func print(name string, value float64, unit string) {
	digits := 2
	if value >= 100 {
		digits = 0
	}
	fmt.Printf("%-44s %12.*f %s\n", name, digits, value, unit)
}
