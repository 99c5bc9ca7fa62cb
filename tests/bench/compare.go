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
// the rounds' ratios and both medians. Returns the ratio: ours over its baseline.
func (b *bench) compare(ctx context.Context, name, unit string, ours, baseline side) (float64, error) {
	var a, c, ratios []float64
	for round := range b.rounds {
		sides := []side{ours, baseline}
		if round%2 == 1 {
			slices.Reverse(sides)
		}
		rates := map[string]float64{}
		for _, s := range sides {
			rate, err := s.rate(ctx)
			if err != nil {
				return 0, fmt.Errorf("%s, %s: %w", name, s.name, err)
			}
			rates[s.name] = rate
		}
		a = append(a, rates[ours.name])
		c = append(c, rates[baseline.name])
		ratios = append(ratios, rates[ours.name]/rates[baseline.name])
	}
	ratio := median(ratios)
	print(name, ratio, "x")
	print(name+"."+ours.name, median(a), unit)
	print(name+"."+baseline.name, median(c), unit)
	return ratio, nil
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}

func print(name string, value float64, unit string) {
	switch {
	case value >= 100:
		fmt.Printf("%-40s %12.0f %s\n", name, value, unit)
	default:
		fmt.Printf("%-40s %12.2f %s\n", name, value, unit)
	}
}
