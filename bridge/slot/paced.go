package slot

import (
	"io"
	"time"
)

const (
	paceWindow = 4 * time.Millisecond
	paceBytes  = 8 << 10  // in a window: a stream that brings so much is busy
	paceSmall  = 16 << 10 // a read of less has taken all there was
	paceSleep  = 300 * time.Microsecond
)

// paced reads a busy stream in larger pieces. The server sends each message by itself: a reader that is quick to wake
// wakes for each, which costs both sides more than the message does (half of the bridge's time, at transactions of one
// row). A stream that is not busy is read at once.
type paced struct {
	r io.Reader

	began  time.Time // the window
	bytes  int       // read in it
	isBusy bool      // the one before was full
	last   int       // what the last read returned
}

func (p *paced) Read(b []byte) (int, error) {
	if now := time.Now(); now.Sub(p.began) >= paceWindow {
		p.isBusy = now.Sub(p.began) < 2*paceWindow && p.bytes >= paceBytes
		p.began, p.bytes = now, 0
	}
	if p.isBusy && p.last < paceSmall {
		nap(paceSleep)
	}
	n, err := p.r.Read(b)
	p.last = n
	p.bytes += n
	return n, err
}
