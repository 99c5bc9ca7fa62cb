//go:build unix

package slot

import (
	"syscall"
	"time"
)

// nap sleeps in the kernel: for so short a time a timer of Go's keeps a processor spinning.
func nap(d time.Duration) {
	t := syscall.NsecToTimespec(d.Nanoseconds())
	_ = syscall.Nanosleep(&t, nil)
}
