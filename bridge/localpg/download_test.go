package localpg

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// repository serves, as a Maven repository does, an archive of links to the programs that are installed here.
func repository(t *testing.T, programs Binaries) (address string, requests *atomic.Int64) {
	t.Helper()
	var archive bytes.Buffer
	tarball := tar.NewWriter(&archive)
	for _, name := range []string{"initdb", "pg_ctl", "postgres"} {
		err := tarball.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: filepath.Join(programs.Dir, name), Mode: 0o755})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := tarball.Close(); err != nil {
		t.Fatal(err)
	}
	var jar bytes.Buffer
	zipped := zip.NewWriter(&jar)
	w, err := zipped.Create("postgres-linux-x86_64.txz")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(xz(archive.Bytes())); err != nil {
		t.Fatal(err)
	}
	if err := zipped.Close(); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(jar.Bytes())
	requests = new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		switch {
		case !strings.Contains(r.URL.Path, "/io/zonky/test/postgres/embedded-postgres-binaries-"):
			http.NotFound(w, r)
		case strings.HasSuffix(r.URL.Path, ".sha256"):
			_, _ = w.Write([]byte(hex.EncodeToString(sum[:])))
		default:
			_, _ = w.Write(jar.Bytes())
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, requests
}

// xz wraps data in the xz format, uncompressed.
func xz(data []byte) []byte {
	var out bytes.Buffer
	sum := func(b []byte) []byte { return binary.LittleEndian.AppendUint32(nil, crc32.ChecksumIEEE(b)) }
	pad := func() { out.Write(make([]byte, -out.Len()&3)) }

	flags := []byte{0, 1} // checked with CRC32
	out.WriteString("\xfd7zXZ\x00")
	out.Write(flags)
	out.Write(sum(flags))

	block := out.Len()
	header := []byte{2, 0, 0x21, 1, 22, 0, 0, 0} // 12 bytes with its checksum; one filter, LZMA2, a dictionary of 8 MB
	out.Write(header)
	out.Write(sum(header))
	control := byte(1) // the first chunk begins a dictionary
	for rest := data; len(rest) > 0; control = 2 {
		chunk := rest[:min(len(rest), 1<<16)]
		rest = rest[len(chunk):]
		out.Write(binary.BigEndian.AppendUint16([]byte{control}, uint16(len(chunk)-1)))
		out.Write(chunk)
	}
	out.WriteByte(0)
	size := out.Len() - block + crc32.Size
	pad()
	out.Write(sum(data))

	index := binary.AppendUvarint(binary.AppendUvarint([]byte{0, 1}, uint64(size)), uint64(len(data)))
	index = append(index, make([]byte, -len(index)&3)...)
	out.Write(index)
	out.Write(sum(index))
	footer := append(binary.LittleEndian.AppendUint32(nil, uint32(len(index)/4)), flags...)
	out.Write(sum(footer))
	out.Write(footer)
	out.WriteString("YZ")
	return out.Bytes()
}

// keepTidy keeps the library's log files, which it leaves, out of the system's directory for them.
func keepTidy(t *testing.T) { t.Setenv("TMPDIR", t.TempDir()) }

func TestDownload(t *testing.T) {
	config := testConfig(t)
	keepTidy(t)
	address, requests := repository(t, config.Binaries)
	dir := filepath.Join(config.Dir, "programs")
	got, err := Download(t.Context(), config.Binaries.Major, dir, address, discard)
	if err != nil {
		t.Fatal(err)
	}
	if got.Major != config.Binaries.Major || !strings.HasPrefix(got.Dir, dir) {
		t.Errorf("got %v, want PostgreSQL %d in %s", got, config.Binaries.Major, dir)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 1 {
		t.Errorf("it leaves %v", left)
	}
	count := requests.Load()
	again, err := Download(t.Context(), config.Binaries.Major, dir, address, discard)
	if err != nil || again != got {
		t.Errorf("the second time: got %v (%v), want %v", again, err, got)
	}
	if n := requests.Load(); count == 0 || n != count {
		t.Errorf("%d requests, and %d after the second time", count, n)
	}

	config.Binaries = got
	config.Dir = filepath.Join(config.Dir, "cluster")
	query(t, start(t, config), `select 'it answers'`)
}

// What was cut short is begun again.
func TestDownloadUnfinished(t *testing.T) {
	config := testConfig(t)
	keepTidy(t)
	address, _ := repository(t, config.Binaries)
	if err := os.MkdirAll(filepath.Join(config.Dir, "download", "postgres", "bin", "pg_ctl"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Download(t.Context(), config.Binaries.Major, config.Dir, address, discard); err != nil {
		t.Error(err)
	}
}

// Only what is not installed is downloaded.
func TestFindOrDownload(t *testing.T) {
	config := testConfig(t)
	keepTidy(t)
	address, requests := repository(t, config.Binaries)
	t.Setenv(fmt.Sprint("SEQUIN_PG_", config.Binaries.Major), config.Binaries.Dir)
	got, err := FindOrDownload(t.Context(), config.Binaries.Major, config.Dir, address, discard)
	if err != nil || got != config.Binaries || requests.Load() > 0 {
		t.Errorf("got %v (%v) with %d requests, want %v", got, err, requests.Load(), config.Binaries)
	}
	for _, d := range downloads {
		if _, err := Find(d.major); err == nil {
			continue
		}
		got, err := FindOrDownload(t.Context(), d.major, config.Dir, address, discard)
		if err != nil || !strings.HasPrefix(got.Dir, config.Dir) || requests.Load() == 0 {
			t.Errorf("PostgreSQL %d: got %v (%v) with %d requests", d.major, got, err, requests.Load())
		}
		return
	}
	t.Skip("every version is installed here")
}

func TestDownloadFails(t *testing.T) {
	keepTidy(t)
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	dir := t.TempDir()
	if _, err := Download(t.Context(), 15, dir, server.URL, discard); err == nil || !strings.Contains(err.Error(), server.URL) {
		t.Errorf("from a repository without it: got %v", err)
	}
	if _, err := Download(t.Context(), 9, dir, server.URL, discard); err == nil || !strings.Contains(err.Error(), "PostgreSQL 9") {
		t.Errorf("a version that there is none of: got %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "postgres-15")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it leaves postgres-15 (%v)", err)
	}
	hang := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	defer slow.Close()
	defer close(hang)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Download(ctx, 15, dir, slow.URL, discard); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
}
