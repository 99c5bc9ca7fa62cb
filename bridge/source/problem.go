package source

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"

	"sequin/bridge/quote"
)

// Problem is why a source cannot be captured as it stands, and what to do about it. It gives nothing away.
type Problem struct {
	Reason string
	Hint   string
}

func (p *Problem) Error() string { return p.Reason }

func problem(hint, reason string, args ...any) *Problem {
	return &Problem{Reason: fmt.Sprintf(reason, args...), Hint: hint}
}

// alter is the statement that has a source reached in another way.
func alter(name string) string {
	return fmt.Sprintf("select sequin.alter_source(%s, conninfo);", quote.Literal(name))
}

// Explain makes a Problem of a connection that failed. The error's own words have host, role and database in them.
func (t *Target) Explain(err error) error {
	alter := alter(t.name)
	ifToStay := "If that is to stay so: " + alter
	var pgErr *pgconn.PgError
	var dns *net.DNSError
	var timeout net.Error
	var certificate *tls.CertificateVerificationError
	switch {
	case errors.Is(err, context.Canceled):
		return fmt.Errorf("connect to the source: %w", context.Canceled)
	case errors.As(err, &pgErr):
		switch {
		case pgErr.Code == pgerrcode.InvalidPassword:
			return problem(alter+" with the right one, or set the bridge's env:NAME.",
				"the source does not take the password")
		case pgErr.Code == pgerrcode.InvalidAuthorizationSpecification && strings.Contains(pgErr.Message, "pg_hba.conf"):
			return problem("A line of type host for the role and the database, in the source's pg_hba.conf.",
				"the source's pg_hba.conf does not let the bridge in")
		case pgErr.Code == pgerrcode.InvalidAuthorizationSpecification:
			return problem("Does the role exist there, and may it log in? "+ifToStay, "the source does not know the bridge's role, or does not let it log in")
		case pgErr.Code == pgerrcode.InvalidCatalogName:
			return problem(ifToStay, "the database does not exist on the source's server")
		}
		return problem("The bridge tries again each second. "+ifToStay, "the source refuses the connection: %s (SQLSTATE %s)", t.Scrub(pgErr.Message), pgErr.Code)
	case errors.As(err, &dns):
		return problem(ifToStay, "the name of the source's server is not known: %s", dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return problem("Is it running? The bridge tries again each second, and goes on where it was. "+ifToStay, "the source cannot be reached: connection refused")
	case errors.As(err, &certificate):
		return problem("sslmode and sslrootcert say what to accept. "+ifToStay, "the source's certificate is not to be trusted")
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return problem("The bridge tries again, and goes on where it was. "+ifToStay, "the source cannot be reached: no answer in time")
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return problem("The bridge tries again each second, and goes on where it was. "+ifToStay, "the source cannot be reached: %s", errno)
	}
	if strings.Contains(err.Error(), "TLS") || strings.Contains(err.Error(), "tls") {
		return problem("sslmode in its conninfo says what to ask for. "+ifToStay, "the source and the bridge do not agree on TLS")
	}
	return problem("The bridge tries again each second, and goes on where it was. "+ifToStay, "the source cannot be reached")
}

// checkVersion refuses a server of this version if it is too old.
func checkVersion(version string) error {
	digits := version
	if i := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = version[:i]
	}
	major, err := strconv.Atoi(digits)
	if err == nil && major < 12 {
		return problem("Upgrade it to PostgreSQL 12 or newer.", "the source is PostgreSQL %s, and 12 is the oldest that can be captured", version)
	}
	return nil
}
