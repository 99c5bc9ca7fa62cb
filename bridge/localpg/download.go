package localpg

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// Repository is where Download finds PostgreSQL, unless it is told another.
const Repository = "https://repo1.maven.org/maven2"

type download struct {
	major   int
	version embeddedpostgres.PostgresVersion
}

// downloads are the releases that Download knows; the first is what it takes if any will do.
var downloads = []download{
	{18, embeddedpostgres.V18},
	{17, embeddedpostgres.V17},
	{16, embeddedpostgres.V16},
	{15, embeddedpostgres.V15},
	{14, embeddedpostgres.V14},
	{13, embeddedpostgres.V13},
	{12, embeddedpostgres.V12},
}

// FindOrDownload returns the programs of a major version (0: of the newest) that are installed, or else downloads them
// into a directory, as Download does.
func FindOrDownload(ctx context.Context, major int, dir, repository string, log *slog.Logger) (Binaries, error) {
	b, err := Find(major)
	if err == nil && b.Major < oldest {
		err = fmt.Errorf("%w from %d on, there is %d", ErrNotFound, oldest, b.Major)
	}
	if !errors.Is(err, ErrNotFound) {
		return b, err
	}
	b, downloadErr := Download(ctx, major, dir, repository, log)
	if downloadErr != nil {
		return b, errors.Join(err, downloadErr)
	}
	return b, nil
}

// oldest is the first major version that Sequin works with.
const oldest = 12

// Download fetches PostgreSQL's programs of a major version (0: any) into a directory, once, from a Maven repository
// that has zonky's builds of them ("": Repository).
func Download(ctx context.Context, major int, dir, repository string, log *slog.Logger) (Binaries, error) {
	i := slices.IndexFunc(downloads, func(d download) bool { return major == 0 || d.major == major })
	if i < 0 {
		return Binaries{}, fmt.Errorf("PostgreSQL %d is not to be downloaded: install it", major)
	}
	major, version := downloads[i].major, downloads[i].version
	home := filepath.Join(dir, fmt.Sprint("postgres-", major))
	if b, err := Look(filepath.Join(home, "bin")); err == nil {
		return b, nil
	}
	repository = cmp.Or(repository, Repository)
	log.Info("downloading PostgreSQL", "version", version, "from", repository, "to", home)

	scratch := filepath.Join(dir, "download")
	if err := os.RemoveAll(scratch); err != nil {
		return Binaries{}, err
	}
	unfinished := filepath.Join(scratch, "postgres")
	// It downloads when it starts a server, and this one is not to start: it is given a cluster that is none, which the
	// server refuses at once.
	data := filepath.Join(scratch, "data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		return Binaries{}, err
	}
	if err := os.WriteFile(filepath.Join(data, "PG_VERSION"), fmt.Append(nil, major, "\n"), 0o644); err != nil {
		return Binaries{}, err
	}
	port, err := freePort()
	if err != nil {
		return Binaries{}, err
	}
	started := make(chan error, 1)
	go func() {
		started <- embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
			Version(version).
			BinaryRepositoryURL(repository).
			Port(uint32(port)).
			CachePath(filepath.Join(scratch, "archive")).
			BinariesPath(unfinished).
			RuntimePath(filepath.Join(scratch, "runtime")).
			DataPath(data).
			Logger(nil)).Start()
	}()
	select {
	case err = <-started:
	case <-ctx.Done():
		return Binaries{}, fmt.Errorf("download PostgreSQL: %w", ctx.Err())
	}
	if _, lookErr := Look(filepath.Join(unfinished, "bin")); lookErr != nil {
		return Binaries{}, fmt.Errorf("download PostgreSQL %s from %s: %w", version, repository, errors.Join(err, lookErr))
	}
	// Whole, or not at all.
	if err := errors.Join(os.RemoveAll(home), os.Rename(unfinished, home), os.RemoveAll(scratch)); err != nil {
		return Binaries{}, fmt.Errorf("keep the downloaded PostgreSQL: %w", err)
	}
	return Look(filepath.Join(home, "bin"))
}
