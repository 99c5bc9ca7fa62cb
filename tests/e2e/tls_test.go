package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"sequin/bridge/localpg"
	"sequin/tests/pgtest"
)

// Where a server lets nobody in without TLS, each connection of the bridge has it, the one for replication too, and a
// server that cannot prove who it is hears nothing: no password either.
func TestTLS(t *testing.T) {
	t.Parallel()
	c, authority := tlsCluster(t)
	db := pgtest.EmptyOn(t, c)
	db.Exec(`create role app login replication password 'not to be seen'`)
	db.Cleanup(func() { db.Exec(`drop owned by app cascade; drop role app`) })
	db.Exec(`grant create on database ` + db.Name + ` to app`)
	db.Exec(`grant create on schema public to app`)
	address := func(root string) string {
		return (&url.URL{
			Scheme: "postgres", User: url.UserPassword("app", "not to be seen"), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(c.Port())),
			Path: db.Name, RawQuery: url.Values{"sslmode": {"verify-full"}, "sslrootcert": {root}}.Encode(),
		}).String()
	}
	migrate := pgtest.StartProcess(t, "migrate", "--database-url", address(authority))
	if err := migrate.Exited(time.Minute); err != nil {
		t.Fatalf("migrate ended with %v: %s", err, migrate.Log())
	}
	b := pgtest.BridgeProcess(t, address(authority))
	b.AwaitLog("msg=capturing")
	db.Exec(`set role app; create table item (id int primary key); select sequin.create_stream('s', '{item}'); insert into item values (1); reset role`)
	pgtest.Eventually(t, 30*time.Second, func() error {
		if !pgtest.Value[bool](db, `select exists (select from sequin.messages)`) {
			return fmt.Errorf("nothing is captured: %s %q", b.Log(), pgtest.Column[string](db, `select concat_ws(' ', status, name, detail, hint) from sequin.health()`))
		}
		return nil
	})
	const connections = `select string_agg(distinct a.backend_type || ' ' || s.ssl, ', ') from pg_stat_activity a join pg_stat_ssl s using (pid) where a.usename = 'app'`
	if got := pgtest.Value[string](db, connections); got != "client backend true, walsender true" {
		t.Errorf("its connections are %s", got)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("the bridge ended with %v: %s", err, b.Log())
	}

	stranger := pgtest.BridgeProcess(t, address(certify(t, t.TempDir())))
	stranger.AwaitLog("certificate")
	if strings.Contains(stranger.Log(), "not to be seen") {
		t.Errorf("the password is in its log: %s", stranger.Log())
	}
}

// tlsCluster starts a server that lets role app in with TLS only, and returns the file with who vouches for it.
func tlsCluster(t *testing.T) (*localpg.Cluster, string) {
	t.Helper()
	rules := pgtest.Rules(t, "host all postgres 127.0.0.1/32 trust\nhostssl all app 127.0.0.1/32 scram-sha-256\n")
	dir := filepath.Dir(rules)
	authority := certify(t, dir)
	c := pgtest.NewCluster(t, map[string]string{"hba_file": rules, "password_encryption": "scram-sha-256"})
	// The server's key has to be whose the server is.
	info, err := os.Stat(c.Dir())
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	key := filepath.Join(dir, "server.key")
	if err := os.Chown(key, int(owner.Uid), int(owner.Gid)); err != nil {
		t.Fatal(err)
	}
	db := pgtest.EmptyOn(t, c)
	db.Exec(fmt.Sprintf(`alter system set ssl_cert_file = '%s'`, authority))
	db.Exec(fmt.Sprintf(`alter system set ssl_key_file = '%s'`, key))
	db.Exec(`alter system set ssl = on`)
	db.Exec(`select pg_reload_conf()`)
	pgtest.Eventually(t, 10*time.Second, func() error {
		if on := pgtest.Value[string](db, `show ssl`); on != "on" {
			return fmt.Errorf("ssl is %s", on)
		}
		return nil
	})
	return c, authority
}

// certify makes a key in a directory, and a certificate for it that vouches for itself, and returns the latter's file.
func certify(t *testing.T, dir string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "server.crt")
	if err := errors.Join(
		os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}), 0o644),
		os.WriteFile(filepath.Join(dir, "server.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return file
}
