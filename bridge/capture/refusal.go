package capture

import "fmt"

// Refusal is why a source is not captured as it stands, and what to do about it.
type Refusal struct {
	Reason string
	Hint   string
}

func (r *Refusal) Error() string { return r.Reason }

func refuse(hint, reason string, args ...any) *Refusal {
	return &Refusal{Reason: fmt.Sprintf(reason, args...), Hint: hint}
}
