package source

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func TestCheckVersion(t *testing.T) {
	t.Parallel()
	for version, isTooOld := range map[string]bool{
		"12.22": false, "15.8 (Debian 15.8-1)": false, "18beta1": false, "11.22": true, "9.6.24": true, "10.23": true, "": false,
	} {
		err := checkVersion(version)
		var p *Problem
		if isTooOld != errors.As(err, &p) || isTooOld && (!strings.Contains(p.Reason, version) || p.Hint == "") {
			t.Errorf("%q: got %v", version, err)
		}
	}
}

func TestExpand(t *testing.T) {
	t.Parallel()
	env := map[string]string{"WHOLE": "postgres://a:b@c/d", "PASSWORD": `p@ss w/'or\d%`}
	lookup := func(name string) (string, bool) {
		v, ok := env[name]
		return v, ok
	}
	for conninfo, password := range map[string]string{
		"env:WHOLE":                             "b",
		"postgres://a:env:PASSWORD@c:5433/d":    env["PASSWORD"],
		"host=c user=a password=env:PASSWORD":   env["PASSWORD"],
		"password = 'env:PASSWORD' host=c":      env["PASSWORD"],
		"postgres://c/d?user=a&password=plain1": "plain1",
	} {
		got, err := expand(conninfo, lookup)
		if err != nil {
			t.Errorf("%s: %v", conninfo, err)
			continue
		}
		config, err := pgx.ParseConfig(got)
		if err != nil || config.Password != password || config.Host != "c" {
			t.Errorf("%s: became %s (%v)", conninfo, got, err)
		}
	}
	_, err := expand("host=c password=env:MISSING", lookup)
	var p *Problem
	if !errors.As(err, &p) || !strings.Contains(p.Reason, "MISSING") {
		t.Errorf("got %v", err)
	}
}

// No error says what the source is reached by, whatever the driver's has in it.
func TestNothingIsGivenAway(t *testing.T) {
	t.Parallel()
	const secret = "hunter2hunter2"
	for _, conninfo := range []string{
		"postgres://app:" + secret + "@127.0.0.1:1/x?sslmode=bogus",
		"host=127.0.0.1 port=none password=" + secret,
		"postgres://app:" + secret + "@[::1/x",
	} {
		if _, err := newTarget("far", conninfo); err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("got %v", err)
		}
	}
	target, err := newTarget("far", "postgres://app:"+secret+"@db.example:1/x")
	if err != nil {
		t.Fatal(err)
	}
	if err := target.Explain(fmt.Errorf("dial db.example: %w", context.Canceled)); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "db.example") {
		t.Errorf("got %v", err)
	}
	for _, err := range []error{
		&pgconn.PgError{Code: "28P01", Message: secret},
		&pgconn.PgError{Code: "XX000", Message: "no " + secret + " at db.example"},
		fmt.Errorf("dial db.example: %s", secret),
	} {
		var p *Problem
		if err := target.Explain(err); !errors.As(err, &p) || strings.Contains(p.Reason+p.Hint, secret) || strings.Contains(p.Reason+p.Hint, "db.example") {
			t.Errorf("got %v", err)
		}
		if !strings.Contains(p.Hint, "select sequin.alter_source('far', conninfo);") {
			t.Errorf("the hint is %s", p.Hint)
		}
		if text := target.ScrubError(err).Error(); strings.Contains(text, secret) {
			t.Errorf("got %s", text)
		}
	}
}
