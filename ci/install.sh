#!/usr/bin/env bash
# The action's first step: sdsurgery in an environment of its own, so that the job's Python stays as it was.
#
# In:  SDSURGERY_PYTHON    a Python to make the environment with; python3 unless given
#      SDSURGERY_VERSION   a released version; the action's own checkout unless given
#      SDSURGERY_SIGNATURE a signature to check: only then what that needs is installed
#      GITHUB_ACTION_PATH  that checkout
#      RUNNER_TEMP         where the environment goes
# Out: python=PATH in the file GITHUB_OUTPUT: the environment's Python
set -euo pipefail

python=${SDSURGERY_PYTHON:-python3}
version=${SDSURGERY_VERSION:-}

fail() {
  printf '::error title=sdsurgery::%s\n' "$1"
  exit 2
}

# Nothing but a number: anything else could be an option, an address or another package.
if [[ -n $version && ! $version =~ ^[0-9][0-9A-Za-z.+!]*$ ]]; then
  fail "the input 'version' takes a version such as 0.1.0; a branch or a commit is named behind the @ of 'uses:'"
fi
# -I: nothing in the checked repository may take a module's place.
"$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "sdsurgery needs Python 3.11 or later; see the input 'python-version'"

extras=
[[ -z ${SDSURGERY_SIGNATURE:-} ]] || extras='[signing]'
if [[ -n $version ]]; then
  what="sdsurgery$extras==$version"
else
  what="$GITHUB_ACTION_PATH$extras"
fi

environment=$(mktemp -d "${RUNNER_TEMP:-${TMPDIR:-/tmp}}/sdsurgery.XXXXXXXX")
"$python" -I -m venv "$environment"
bin=$environment/bin
[[ -d $bin ]] || bin=$environment/Scripts
"$bin/python" -I -m pip install --quiet --disable-pip-version-check --no-input "$what"
printf 'python=%s\n' "$bin/python" >>"$GITHUB_OUTPUT"
