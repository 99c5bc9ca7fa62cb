//go:build !unix

package slot

import "time"

func nap(d time.Duration) { time.Sleep(d) }
