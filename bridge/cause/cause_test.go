package cause

import (
	"errors"
	"fmt"
	"net"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// server takes connections that it refuses TLS, and then says no.
func server(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				request := make([]byte, 1024)
				n, err := conn.Read(request)
				if err != nil {
					return
				}
				if n == 8 {
					_, _ = conn.Write([]byte("N"))
					return
				}
				body := "SFATAL\x00VFATAL\x00C28P01\x00Mno such password\x00\x00"
				_, _ = fmt.Fprintf(conn, "E%c%c%c%c%s", 0, 0, 0, len(body)+4, body)
			}()
		}
	}()
	return l.Addr().String()
}

func TestText(t *testing.T) {
	t.Parallel()
	address := server(t)
	for mode, want := range map[string]string{
		"prefer":  "try: failed to connect to `user=u database=d`: " + address + " (127.0.0.1): server error: FATAL: no such password (SQLSTATE 28P01)",
		"disable": "try: failed to connect to `user=u database=d`: " + address + " (127.0.0.1): server error: FATAL: no such password (SQLSTATE 28P01)",
		"require": "try: failed to connect to `user=u database=d`: " + address + " (127.0.0.1): tls error: server refused TLS connection",
	} {
		_, err := pgconn.Connect(t.Context(), "postgres://u@"+address+"/d?sslmode="+mode)
		if err == nil {
			t.Fatal("let in")
		}
		if got := Text(fmt.Errorf("try: %w", err)); got != want {
			t.Errorf("%s: got %q, want %q", mode, got, want)
		}
	}
	if got := Text(errors.New("another")); got != "another" {
		t.Errorf("got %q", got)
	}
}
