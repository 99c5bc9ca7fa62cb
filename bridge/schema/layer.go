package schema

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"sequin/migrations"
	"sequin/sql"
)

// file is a part of the repeatable layer.
type file struct {
	name string
	text string
}

const contents = "install.sql" // names the files of the layer, in order

// layer returns the files of the repeatable layer in the order they are installed, and a checksum over them all.
func layer() ([]file, string, error) {
	toc, err := fs.ReadFile(sql.FS, contents)
	if err != nil {
		return nil, "", fmt.Errorf("read the table of contents: %w", err)
	}
	hash := sha256.New()
	hash.Write(toc)
	var files []file
	for line := range strings.Lines(string(toc)) {
		name := strings.TrimSpace(line)
		if name == "" || strings.HasPrefix(name, "--") {
			continue
		}
		text, err := fs.ReadFile(sql.FS, name)
		if err != nil {
			return nil, "", fmt.Errorf("read %s: %w", name, err)
		}
		hash.Write(text)
		// Not every encoding has an ellipsis.
		files = append(files, file{name, strings.ReplaceAll(string(text), "…", "...")})
	}
	return files, hex.EncodeToString(hash.Sum(nil)), nil
}

// newestMigration returns the number of the last migration, and how many there are.
func newestMigration() (last, count int64, err error) {
	names, err := fs.Glob(migrations.FS, "*.sql")
	if err != nil {
		return 0, 0, fmt.Errorf("list migrations: %w", err)
	}
	for _, name := range names {
		number, _, _ := strings.Cut(name, "_")
		n, err := strconv.ParseInt(number, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("migration %s has no number: %w", name, err)
		}
		last = max(last, n)
	}
	return last, int64(len(names)), nil
}
