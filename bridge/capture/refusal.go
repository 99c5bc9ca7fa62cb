package capture

import "fmt"

// Refusal is why a source is not captured as it stands, and what to do about it.
type Refusal struct {
	Reason string
	Hint   string
}

func (r *Refusal) Error() string { return r.Reason }

// errAwaited is returned where the server takes the bridge for a standby. It tells a commit to be done when the bridge has it,
// which writes it into a commit of its own; and what the bridge has is no copy of the data.
var errAwaited = refuse("Name the standbys instead: alter system set synchronous_standby_names = 'FIRST 1 (…)'; select pg_reload_conf();",
	"synchronous_standby_names is *, and so takes the bridge for a standby: commits would wait for the bridge, and the bridge for its own")

func refuse(hint, reason string, args ...any) *Refusal {
	return &Refusal{Reason: fmt.Sprintf(reason, args...), Hint: hint}
}
