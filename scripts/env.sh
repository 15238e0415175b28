# Sourced by quickstart.sh, test.sh and the tables, from the repository's folder: makes .venv, installs the requirement
# files that are named after it, once, and activates it. PYTHON chooses another interpreter than python3. What a killed
# call has left is made anew; a .venv without pip, that was moved, or whose Python is gone, is completed in its place.
stop() { echo "env.sh: error: $1" >&2; exit 2; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; }

version() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")'; }

works() {           # whether activating .venv makes its own Python, with pip, the one that is called
    (source .venv/bin/activate && [ "$(dirname "$(command -v python)")" -ef .venv/bin ] && recent python &&
        python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' && python -m pip --version) > /dev/null 2>&1
}

if [ -e .venv/unfinished ]; then            # pip may take an incomplete package for installed
    find .venv/ -mindepth 1 -maxdepth 1 ! -name unfinished -exec rm -rf {} +
fi
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && .venv/bin/python -c '' 2> /dev/null; then python=.venv/bin/python; fi
recent "$python" || stop "'$python' is missing or older than Python 3.10; set PYTHON to a newer one"
if ! works; then
    [ -n "$(ls -A .venv 2> /dev/null)" ] || { mkdir -p .venv && touch .venv/unfinished; } || stop '.venv cannot be made'
    [ "$python" = .venv/bin/python ] || rm -f .venv/bin/python*
    # A part of pip counts as installed, and the other packages may be of another Python.
    rm -rf .venv/lib/python3*/site-packages/{pip,setuptools}{,-[0-9]*} .venv/*requirements.txt
    "$python" -m venv .venv && works || stop "'$python -m venv .venv' failed; on Debian and Ubuntu: apt install \
python3-venv; else delete .venv"
elif [ "$(version "$python")" != "$(version .venv/bin/python)" ]; then
    stop ".venv has Python $(version .venv/bin/python), PYTHON is $(version "$python"): expected the same, or no .venv"
fi
source .venv/bin/activate
for file in "$@"; do
    if ! cmp -s "$file" ".venv/${file//\//_}"; then
        echo "Installing $file into .venv (PyTorch takes a few minutes and 5 GB)"
        python -m pip install --quiet --disable-pip-version-check -r "$file" || stop "pip could not install $file"
        cp "$file" ".venv/${file//\//_}"
    fi
done
rm -f .venv/unfinished
