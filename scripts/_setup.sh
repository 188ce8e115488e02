# Sourced by test.sh and demo.sh: changes to the root of the checkout and sets `python` to an interpreter with all
# requirements. Uses an active virtual or conda environment (except conda's base) and adds what is missing there;
# otherwise creates .venv here. scripts/_install.py does the installing.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'Error: %s\n' "$*" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

active_environment() {
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        printf '%s' "$VIRTUAL_ENV"
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base ]]; then
        printf '%s' "$CONDA_PREFIX"
    fi
}

make_venv() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if is_recent "$candidate"; then
            echo "Creating the virtual environment .venv with $("$candidate" --version)"
            "$candidate" -m venv --clear .venv || fail "'$candidate -m venv .venv' failed (see above);" \
                "install your system's venv package for Python, or activate an environment of your own"
            return
        fi
    done
    fail "no Python 3.11 or newer found as python3; install one, or activate an environment that has one"
}

set_up() {
    local environment
    environment=$(active_environment)
    if [[ -n $environment && ! $environment -ef .venv ]]; then
        python=$environment/bin/python
        [[ -x $python ]] || fail "the active environment $environment has no bin/python; deactivate it and try again"
        is_recent "$python" || fail "the active environment $environment has $("$python" --version 2>&1)," \
            "but 3.11 or newer is needed; deactivate it to get a suitable .venv here"
        "$python" scripts/_install.py add
    else
        python=$PWD/.venv/bin/python
        # after a system upgrade of Python, the packages of an old .venv, pip among them, are missing
        "$python" -c 'import pip' >/dev/null 2>&1 || make_venv
        "$python" scripts/_install.py sync
    fi
}

set_up
