package schema

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Version is that of the schema in this program.
const Version = "0.1.0"

// State is how a database's schema compares with this program's.
type State int

// What a schema may be.
const (
	Missing State = iota // there is none
	Older                // sequin migrate brings it up
	Same
	Changed // the same version, with another text
	Newer   // of a later program than this
)

// Why a schema is not used, or a database not touched.
var (
	ErrMissing = errors.New("the database has no sequin schema: run sequin migrate")
	ErrOlder   = errors.New("the database's sequin schema is older than this program: run sequin migrate")
	ErrNewer   = errors.New("the database's sequin schema is newer than this program: upgrade the program")
	ErrForeign = errors.New("the database has a schema sequin that is not Sequin's, and is left as it is: " +
		"alter schema sequin rename to …; lets Sequin be installed beside it")
	ErrPublication = errors.New("the database has a publication sequin already: alter publication sequin rename to …; or, " +
		"where an earlier installation left it, drop publication sequin;")
)

// Status is what is installed.
type Status struct {
	State     State
	Version   string // of what is installed
	Migration int64  // the last that was run
	Pending   int64  // how many are left
	Checksum  string // of the functions and views
	AppliedAt time.Time
}

// Look finds out what is installed.
func Look(ctx context.Context, conn *pgx.Conn) (Status, error) {
	var s Status
	var isThere bool
	err := conn.QueryRow(ctx, `select pg_catalog.to_regclass('sequin.sql_version') is not null
		and pg_catalog.to_regclass('sequin.goose_db_version') is not null`).Scan(&isThere)
	if err != nil {
		return s, fmt.Errorf("look at the schema: %w", err)
	}
	target, count, err := newestMigration()
	if err != nil {
		return s, err
	}
	s.Pending = count
	if !isThere {
		return s, nil
	}
	err = conn.QueryRow(ctx, `select coalesce(max(g.version_id), 0), count(*) filter (where g.version_id > 0)
		from sequin.goose_db_version g where g.is_applied`).Scan(&s.Migration, &s.Pending)
	if err != nil {
		return s, fmt.Errorf("look at migrations: %w", err)
	}
	s.Pending = max(0, count-s.Pending)
	err = conn.QueryRow(ctx, `select v.version, v.checksum, v.applied_at from sequin.sql_version v order by v.id desc limit 1`).
		Scan(&s.Version, &s.Checksum, &s.AppliedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("look at functions and views: %w", err)
	}
	_, checksum, err := layer()
	if err != nil {
		return s, err
	}
	switch order := compareVersions(s.Version, Version); {
	case s.Migration > target || order > 0:
		s.State = Newer
	case s.Migration < target || order < 0:
		s.State = Older
	case s.Checksum != checksum:
		s.State = Changed
	default:
		s.State = Same
	}
	return s, nil
}

// checkOwn refuses a schema by Sequin's name that somebody else has filled.
func checkOwn(ctx context.Context, conn *pgx.Conn) error {
	var isForeign bool
	err := conn.QueryRow(ctx, `select pg_catalog.to_regclass('sequin.goose_db_version') is null and exists (
		  select from pg_catalog.pg_class c where c.relnamespace = pg_catalog.to_regnamespace('sequin')
		  union all
		  select from pg_catalog.pg_proc p where p.pronamespace = pg_catalog.to_regnamespace('sequin')
		  union all
		  select from pg_catalog.pg_type t where t.typnamespace = pg_catalog.to_regnamespace('sequin'))`).Scan(&isForeign)
	if err != nil {
		return fmt.Errorf("look at the schema: %w", err)
	}
	if isForeign {
		return ErrForeign
	}
	return nil
}

// CheckNames refuses a schema or a publication by Sequin's name that is somebody else's.
func CheckNames(ctx context.Context, conn *pgx.Conn) error {
	if err := checkOwn(ctx, conn); err != nil {
		return err
	}
	var isThere bool
	err := conn.QueryRow(ctx, `select pg_catalog.to_regclass('sequin.source') is null
		and exists (select from pg_catalog.pg_publication p where p.pubname = 'sequin')`).Scan(&isThere)
	if err != nil {
		return fmt.Errorf("look at publications: %w", err)
	}
	if isThere {
		return ErrPublication
	}
	return nil
}

// Check refuses a schema that is not this program's, and says which of the two to bring up.
func Check(ctx context.Context, conn *pgx.Conn) error {
	s, err := Look(ctx, conn)
	if err != nil {
		return err
	}
	switch s.State {
	case Missing:
		return ErrMissing
	case Older:
		return fmt.Errorf("%w (it is %s, the program's is %s)", ErrOlder, s.Version, Version)
	case Newer:
		return fmt.Errorf("%w (it is %s, the program's is %s)", ErrNewer, s.Version, Version)
	}
	return nil
}

// compareVersions orders 1.2.3 and 1.10.0 as versions are.
func compareVersions(a, b string) int {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(as), len(bs)) {
		if d := part(as, i) - part(bs, i); d != 0 {
			return d
		}
	}
	return 0
}

func part(version []string, i int) int {
	if i >= len(version) {
		return 0
	}
	n, _ := strconv.Atoi(version[i])
	return n
}

func (s State) String() string {
	switch s {
	case Missing:
		return "missing: sequin migrate installs it"
	case Older:
		return "older than this program: sequin migrate brings it up"
	case Newer:
		return "newer than this program: upgrade the program"
	case Changed:
		return "functions and views of the same version, with another text: sequin migrate installs this program's"
	}
	return "current"
}
