package source

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"sequin/bridge/address"
	"sequin/bridge/pinned"
)

// Queryer is a connection, or a pool of them, to the log's database.
type Queryer interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Target is how a source is reached.
type Target struct {
	name    string // of the source, for hints
	address string
	config  *pgx.ConnConfig
}

// connectTimeout is for those that say nothing of it.
const connectTimeout = 10 * time.Second

// Resolve returns the connection string of a source, env:NAME in it read; of the log's own database it is empty. Where
// there is none to be had, the error is a Problem.
func Resolve(ctx context.Context, db Queryer, sourceID int32) (string, error) {
	var conninfo *string
	if err := db.QueryRow(ctx, `select sequin.bridge_conninfo($1)`, sourceID).Scan(&conninfo); err != nil {
		return "", fmt.Errorf("read how source %d is reached: %w", sourceID, err)
	}
	if conninfo == nil {
		return "", nil
	}
	return expand(*conninfo, os.LookupEnv)
}

// Reach returns how a source is reached, without trying to.
func Reach(ctx context.Context, db Queryer, sourceID int32, name string) (*Target, error) {
	address, err := Resolve(ctx, db, sourceID)
	if err != nil {
		return nil, err
	}
	return newTarget(name, address)
}

func newTarget(name, conninfo string) (*Target, error) {
	config, err := address.Parse(conninfo)
	if err != nil || conninfo == "" {
		return nil, problem("Check it with psql, and then: "+alter(name),
			"what the source is reached by cannot be read as a URL or as libpq's key=value pairs")
	}
	config.ConnectTimeout = cmp.Or(config.ConnectTimeout, connectTimeout)
	return &Target{name: name, address: conninfo, config: config}, nil
}

var (
	envWhole  = regexp.MustCompile(`^env:([A-Za-z_][A-Za-z0-9_]*)$`)
	envInURL  = regexp.MustCompile(`env:([A-Za-z_][A-Za-z0-9_]*)`)
	envInPair = regexp.MustCompile(`=(\s*)'?env:([A-Za-z_][A-Za-z0-9_]*)'?`)
)

// expand puts the values of environment variables in the place of env:NAME: the whole, or a value in it.
func expand(conninfo string, lookup func(string) (string, bool)) (string, error) {
	var missing string
	value := func(name string) string {
		v, ok := lookup(name)
		if !ok {
			missing = name
		}
		return v
	}
	switch {
	case envWhole.MatchString(conninfo):
		conninfo = value(envWhole.FindStringSubmatch(conninfo)[1])
	case strings.HasPrefix(conninfo, "postgres://"), strings.HasPrefix(conninfo, "postgresql://"):
		conninfo = envInURL.ReplaceAllStringFunc(conninfo, func(m string) string {
			return strings.ReplaceAll(url.QueryEscape(value(envInURL.FindStringSubmatch(m)[1])), "+", "%20")
		})
	default:
		conninfo = envInPair.ReplaceAllStringFunc(conninfo, func(m string) string {
			parts := envInPair.FindStringSubmatch(m)
			return "=" + parts[1] + "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value(parts[2])) + "'"
		})
	}
	if missing != "" {
		return "", problem("Start the bridge with it set.", "the bridge has no environment variable %s", missing)
	}
	return conninfo, nil
}

// Address returns what the source is reached by: not to be shown.
func (t *Target) Address() string { return t.address }

// User returns the role that the bridge is there.
func (t *Target) User() string { return t.config.User }

// Connect opens a connection to the source that no setting there gets in the way of. It refuses a server that is too old.
func (t *Target) Connect(ctx context.Context, name string, settings map[string]string) (*pgx.Conn, error) {
	return t.connect(ctx, name, settings, false)
}

func (t *Target) connect(ctx context.Context, name string, settings map[string]string, hasPath bool) (*pgx.Conn, error) {
	config := t.config.Copy()
	config.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	maps.Copy(config.RuntimeParams, settings)
	config.RuntimeParams["application_name"] = name
	pinned.Pin(config.RuntimeParams)
	if hasPath {
		delete(config.RuntimeParams, "search_path") // the role's own
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, t.Explain(err)
	}
	if err := checkVersion(conn.PgConn().ParameterStatus("server_version")); err != nil {
		_ = conn.Close(ctx)
		return nil, err
	}
	if err := pinned.Settle(ctx, conn); err != nil {
		_ = conn.Close(context.WithoutCancel(ctx))
		return nil, t.ScrubError(err)
	}
	return conn, nil
}

// Scrub takes what the source is reached by out of a text.
func (t *Target) Scrub(text string) string {
	secrets := []string{t.address, t.config.Password, t.config.Host}
	for _, f := range t.config.Fallbacks {
		secrets = append(secrets, f.Host)
	}
	for _, s := range secrets {
		if len(s) >= 4 {
			text = strings.ReplaceAll(text, s, "…")
		}
	}
	return text
}

// ScrubError is Scrub for what is logged of an error.
func (t *Target) ScrubError(err error) error {
	if text := t.Scrub(err.Error()); text != err.Error() {
		return errors.New(text)
	}
	return err
}
