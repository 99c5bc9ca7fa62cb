package dev

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"sequin/bridge"
	"sequin/bridge/localpg"
	"sequin/bridge/schema"
)

// Config is what Run needs.
type Config struct {
	Dir        string       // of the server: made where it does not exist
	Major      int          // of PostgreSQL; default: the directory's own, else the newest that is installed
	Port       int          // default: the one it had last time, if that is free
	Repository string       // to download PostgreSQL from, where none is installed; default: localpg.Repository
	Version    string       // of the program
	Log        *slog.Logger // default: slog.Default()

	Ready func(Server) // called once, when all is up
}

// Server is what Run runs.
type Server struct {
	URL      string // of the database
	Dir      string
	Binaries localpg.Binaries
}

// database is the one that is served: it is there in every new cluster, and what psql would take.
const database = "postgres"

const stopTimeout = 30 * time.Second

// DefaultDir returns the directory for who does not choose one.
func DefaultDir() (string, error) {
	if os.Geteuid() == 0 {
		// The server does not run as root, and nobody else gets into root's home.
		return "/var/lib/sequin/dev", nil
	}
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "sequin", "dev"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find a directory: %w", err)
	}
	return filepath.Join(home, ".local", "share", "sequin", "dev"), nil
}

// Run starts the server, installs the schema and runs a bridge. When the context ends it stops the
// bridge and then the server, and returns nil. What is in the directory stays for the next time.
func Run(ctx context.Context, config Config) error {
	config.Log = cmp.Or(config.Log, slog.Default())
	var err error
	if config.Dir, err = filepath.Abs(config.Dir); err != nil {
		return err
	}
	if err := os.MkdirAll(config.Dir, 0o755); err != nil {
		return err
	}
	unlock, err := lock(config.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	cluster, err := start(ctx, config)
	if err != nil {
		return unlessStopped(ctx, err)
	}
	err = errors.Join(serve(ctx, config, cluster), stop(cluster))
	config.Log.Info("server stopped")
	return err
}

// start starts the server.
func start(ctx context.Context, config Config) (*localpg.Cluster, error) {
	major := config.Major
	if major == 0 {
		var err error
		if major, err = localpg.MajorOf(config.Dir); err != nil {
			return nil, err
		}
	}
	binaries, err := localpg.FindOrDownload(ctx, major, config.Dir, config.Repository, config.Log)
	if err != nil {
		return nil, err
	}
	port := config.Port
	if port == 0 {
		port = lastPort(config.Dir)
	}
	cluster, err := localpg.Start(ctx, localpg.Config{Binaries: binaries, Dir: config.Dir, Port: port, Log: config.Log})
	if err != nil {
		return nil, err
	}
	config.Log.Info("server started", "postgres", binaries.Major, "dir", config.Dir, "port", cluster.Port())
	if err := keepPort(config.Dir, cluster.Port()); err != nil {
		return nil, errors.Join(err, stop(cluster))
	}
	return cluster, nil
}

// serve installs the schema and runs the bridge.
func serve(ctx context.Context, config Config, cluster *localpg.Cluster) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	url := cluster.URL(database)
	if err := schema.Up(ctx, url, config.Log); err != nil {
		return unlessStopped(ctx, err)
	}
	b, err := bridge.New(bridge.Config{DatabaseURL: url, Log: config.Log, Version: config.Version})
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	ready := b.Ready()
	for {
		select {
		case <-ready:
			ready = nil
			config.Ready(Server{URL: url, Dir: config.Dir, Binaries: cluster.Binaries()})
		case err := <-done:
			return err
		case <-cluster.Exited():
			cancel()
			return errors.Join(fmt.Errorf("the server ended by itself: %s says why", cluster.LogFile()), <-done)
		}
	}
}

// stop sends everyone away and stops the server.
func stop(cluster *localpg.Cluster) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := cluster.Stop(ctx, localpg.Fast)
	if err == nil {
		return nil
	}
	ctx, cancel = context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return errors.Join(err, cluster.Stop(ctx, localpg.Immediate))
}

// unlessStopped returns an error, unless it is that of being told to stop.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
