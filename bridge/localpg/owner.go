package localpg

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// owner is who the server runs as: PostgreSQL refuses to run as root.
type owner struct {
	uid, gid int
	isSelf   bool
}

// findOwner returns the user to run as: oneself; for root, postgres or else nobody.
func findOwner() (owner, error) {
	if os.Geteuid() != 0 {
		return owner{uid: os.Geteuid(), gid: os.Getegid(), isSelf: true}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err := errors.Join(err1, err2); err != nil {
			return owner{}, fmt.Errorf("look up user %s: %w", name, err)
		}
		return owner{uid: uid, gid: gid}, nil
	}
	return owner{}, errors.New("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")
}

// run has a command run as the owner, and not end with the terminal's signals: who started it ends it, or its death.
func (o owner) run(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	endWithParent(cmd.SysProcAttr)
	if !o.isSelf {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(o.uid), Gid: uint32(o.gid)}
		cmd.Env = append(os.Environ(), "HOME=/", "LC_ALL=C")
	}
}

// give makes a directory the owner's, and sees that it can be reached.
func (o owner) give(dir string) error {
	if o.isSelf {
		return nil
	}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, o.uid, o.gid)
	})
	if err != nil {
		return fmt.Errorf("give %s to user %d: %w", dir, o.uid, err)
	}
	return o.reach(dir)
}

// reach refuses a directory that the owner cannot get at.
func (o owner) reach(dir string) error {
	if o.isSelf {
		return nil
	}
	for path := dir; ; path = filepath.Dir(path) {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		stat, ok := info.Sys().(*syscall.Stat_t)
		if info.Mode().Perm()&0o001 == 0 && (!ok || int(stat.Uid) != o.uid) {
			return fmt.Errorf("user %d, whom the server runs as, cannot reach %s through %s: choose another directory", o.uid, dir, path)
		}
		if path == filepath.Dir(path) {
			return nil
		}
	}
}
