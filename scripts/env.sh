# Sourced by quickstart.sh and test.sh, from the repository's folder: makes .venv, installs the requirement files that
# are named after it, once, and activates it. PYTHON chooses another interpreter than python3.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "env.sh: error: '$python' is missing or older than Python 3.10; set PYTHON to a newer one" >&2; exit 2; }
if [ ! -d .venv ]; then
    "$python" -m venv .venv || { rm -rf .venv; echo "env.sh: error: '$python -m venv' failed; on Debian and Ubuntu:" \
        "apt install python3-venv" >&2; exit 2; }
fi
source .venv/bin/activate
for file in "$@"; do
    if ! cmp -s "$file" ".venv/${file//\//_}"; then
        echo "Installing $file into .venv (PyTorch takes a few minutes and 5 GB)"
        python -m pip install --quiet --disable-pip-version-check -r "$file"
        cp "$file" ".venv/${file//\//_}"
    fi
done
