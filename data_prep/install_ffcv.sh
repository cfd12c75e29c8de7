#!/bin/sh
# Installs ffcv with the given pip, and the system packages that it is built against where they are missing and we
# may install them. Where that cannot be, says what to ask for and succeeds: the torchvision loader needs no ffcv.
# usage: install_ffcv.sh PIP
set -u
pip=$1
python="$(dirname "$pip")/python"
needed="pkg-config libopencv-dev libturbojpeg0-dev g++"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
[ -f "$headers/Python.h" ] || needed="$needed python3-dev"

"$pip" show --quiet ffcv 2>/dev/null && exit 0

without() {
    echo "ffcv is left out: $1" >&2
    echo "The torchvision loader is used instead. For ffcv, ask the administrator for: apt-get install $needed" >&2
    echo "and then run: $pip install --constraint constraints.txt ffcv" >&2
    exit 0
}

found() {
    command -v g++ >/dev/null && command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg &&
        [ -f "$headers/Python.h" ]
}

if ! found; then
    command -v apt-get >/dev/null || without "its system packages are missing, and this is no Debian or Ubuntu"
    if [ "$(id -u)" -eq 0 ]; then
        sudo=""
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo="sudo -n"
    else
        without "its system packages are missing, and there is neither root nor sudo to install them"
    fi
    echo "installing ffcv's system packages: $needed"
    $sudo apt-get update -qq || without "apt-get update failed"
    # shellcheck disable=SC2086  # the list is words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $needed >/dev/null ||
        without "apt-get install failed"
    found || without "opencv4, libturbojpeg or Python.h are not found after installing them"
fi
echo "building ffcv"
"$pip" install --quiet --disable-pip-version-check --constraint constraints.txt ffcv ||
    without "it could not be built, see above"
"$python" -c 'import ffcv' || {
    "$pip" uninstall --quiet --yes ffcv
    without "it was built but cannot be imported, see above"
}
