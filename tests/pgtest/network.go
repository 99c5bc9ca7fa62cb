package pgtest

import (
	"errors"
	"io"
	"net"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"

	"sequin/bridge/localpg"
)

// Network is the way to a server, which can be cut.
type Network struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	fault Fault
	wires []*wire
}

// Fault is what a Network does to what is sent over it.
type Fault int

// The faults. What was on its way over a connection that was lost in silence never arrives, and neither side is told, even
// when the network is whole again.
const (
	Whole  Fault = iota
	Cut          // connections end, and new ones are refused
	Reset        // connections are reset, and new ones too
	Silent       // nothing arrives any more, and nothing says so
	Slow         // 1 MB/s, with pauses
)

// NewNetwork returns a way to a server that is whole.
func NewNetwork(t testing.TB, c *localpg.Cluster) *Network {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &Network{listener: listener, target: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.Port()))}
	go n.accept()
	t.Cleanup(func() {
		_ = listener.Close()
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, w := range n.wires {
			w.close()
		}
	})
	return n
}

// URL returns a database's address over the network.
func (n *Network) URL(t testing.TB, db *DB) string {
	t.Helper()
	u, err := url.Parse(db.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = n.listener.Addr().String()
	return u.String()
}

// Set makes it have a fault, or none.
func (n *Network) Set(fault Fault) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fault = fault
	for _, w := range n.wires {
		switch fault {
		case Cut:
			w.close()
		case Reset:
			w.reset()
		case Silent:
			w.isSilent = true
		}
	}
}

func (n *Network) accept() {
	for {
		client, err := n.listener.Accept()
		if err != nil {
			return
		}
		n.mu.Lock()
		w := &wire{network: n, client: client.(*net.TCPConn)}
		switch n.fault {
		case Cut:
			w.close()
		case Reset:
			w.reset()
		case Silent:
			w.isSilent = true
			n.wires = append(n.wires, w)
		default:
			if server, err := net.Dial("tcp", n.target); err != nil {
				w.close()
			} else {
				w.server = server.(*net.TCPConn)
				n.wires = append(n.wires, w)
				go w.carry(w.client, w.server)
				go w.carry(w.server, w.client)
			}
		}
		n.mu.Unlock()
	}
}

// wire is a connection over a network.
type wire struct {
	network        *Network
	client, server *net.TCPConn
	isSilent       bool
}

func (w *wire) close() {
	for _, conn := range []*net.TCPConn{w.client, w.server} {
		if conn != nil {
			_ = conn.Close()
		}
	}
}

func (w *wire) reset() {
	for _, conn := range []*net.TCPConn{w.client, w.server} {
		if conn != nil {
			_ = conn.SetLinger(0)
		}
	}
	w.close()
}

// carry takes what comes from one end to the other, as long as that is possible. Of a silent wire neither end learns
// anything, not even that the other has closed it.
func (w *wire) carry(from, to *net.TCPConn) {
	buf := make([]byte, 16<<10)
	for {
		count, err := from.Read(buf)
		w.network.mu.Lock()
		isSilent, fault := w.isSilent, w.network.fault
		w.network.mu.Unlock()
		switch {
		case isSilent:
			return
		case err != nil:
			if !errors.Is(err, io.EOF) {
				w.reset()
			} else {
				w.close()
			}
			return
		case fault == Slow:
			time.Sleep(16 * time.Millisecond) // a slow network is the point
		}
		if _, err := to.Write(buf[:count]); err != nil {
			w.close()
			return
		}
	}
}
