package pgtest

import (
	"context"
	"net"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"

	"sequin/bridge/localpg"
)

// Network is the way to a server, which can be cut: a toxiproxy.
type Network struct {
	t     testing.TB
	proxy *toxiproxy.Proxy
}

// Fault is what a Network does to what is sent over it.
type Fault int

// The faults.
const (
	Whole    Fault = iota
	Cut            // connections end, and new ones are refused
	Reset          // connections end as soon as something is sent over them, and new ones are reset
	HalfOpen       // nothing arrives any more, and nothing says so before the network is whole again
	Silent         // nothing arrives any more, and nothing ever says so, not even that the other end has gone
	Limited        // a connection ends after some data, in the middle of a message
	Sliced         // messages arrive in small pieces
	Slow           // 1 MB/s, late
)

// What a fault is made of, as toxiproxy's API has it; each is put in both ways of a connection.
var toxicOf = map[Fault][]string{
	Reset:    {`"type": "reset_peer"`},
	HalfOpen: {`"type": "timeout"`},
	Silent:   {`"type": "silence"`},
	Limited:  {`"type": "limit_data", "attributes": {"bytes": 100000}`},
	Sliced:   {`"type": "slicer", "attributes": {"average_size": 100, "size_variation": 90, "delay": 50}`},
	Slow:     {`"type": "latency", "attributes": {"latency": 10, "jitter": 10}`, `"type": "bandwidth", "attributes": {"rate": 1000}`},
}

func init() {
	zerolog.SetGlobalLevel(zerolog.Disabled)
	toxics.Register("silence", new(silence))
}

// NewNetwork returns a way to a server that is whole.
func NewNetwork(t testing.TB, c *localpg.Cluster) *Network {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	n := &Network{t: t, proxy: toxiproxy.NewProxy(server, "network", "127.0.0.1:0", net.JoinHostPort("127.0.0.1", strconv.Itoa(c.Port())))}
	if err := n.proxy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.proxy.Stop)
	return n
}

// URL returns a database's address over the network.
func (n *Network) URL(t testing.TB, db *DB) string {
	t.Helper()
	u, err := url.Parse(db.URL)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = n.proxy.Listen
	return u.String()
}

// Set makes it have a fault, or none.
func (n *Network) Set(fault Fault) {
	n.t.Helper()
	n.proxy.Toxics.ResetToxics(context.Background())
	if fault == Cut {
		n.proxy.Stop()
		return
	}
	if !n.proxy.Enabled {
		Eventually(n.t, 30*time.Second, n.proxy.Start) // somebody may have the port for a moment
	}
	// To the bridge first: when it is kept from reading, nothing may keep it from writing.
	for _, way := range []string{"downstream", "upstream"} {
		for _, toxic := range toxicOf[fault] {
			if _, err := n.proxy.Toxics.AddToxicJson(strings.NewReader(`{"stream": "` + way + `", ` + toxic + `}`)); err != nil {
				n.t.Fatal(err)
			}
		}
	}
}

// silence is a toxic that loses all, and the end of a connection too. toxiproxy's own, timeout, tells one end that the other has
// gone, and both when it is taken away.
type silence struct{}

func (*silence) Pipe(stub *toxics.ToxicStub) {
	input := stub.Input
	for {
		select {
		case <-stub.Interrupt:
			return
		case chunk := <-input:
			if chunk == nil {
				input = nil
			}
		}
	}
}

// Cleanup leaves a connection that was lost as it is: what would end it is told to nobody.
func (*silence) Cleanup(stub *toxics.ToxicStub) {
	stub.Output = make(chan *stream.StreamChunk)
	stub.Close()
}
