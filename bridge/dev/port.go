package dev

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The port is kept, so that an address that was written down somewhere serves the next time too.
func portFile(dir string) string { return filepath.Join(dir, "port") }

// lastPort returns the port that was used last time; 0 where there is none, or another has it now.
func lastPort(dir string) int {
	text, err := os.ReadFile(portFile(dir))
	if err != nil {
		return 0
	}
	port, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return 0
	}
	_ = l.Close()
	return port
}

func keepPort(dir string, port int) error {
	if err := os.WriteFile(portFile(dir), fmt.Appendln(nil, port), 0o644); err != nil {
		return fmt.Errorf("keep the port: %w", err)
	}
	return nil
}
