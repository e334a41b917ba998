# Installs what the lab and the tests need. Sourced by labs/quickstart and tests/run, which set
# `root` (the folder of this project) and then call `bootstrap EXTRA...` with the names of the
# optional dependencies to install (see pyproject.toml).
#
# Everything that is done already is left alone, so a second run takes a moment. What it changes
# on the machine: Debian packages that were missing, and .venv in the project's folder.
# shellcheck shell=bash
: "${root:?set it before sourcing this file}"

packages=(
    bird2 conntrack containernetworking-plugins etcd-client etcd-server frr gcc iproute2 ipset
    iptables iputils-ping libc6-dev procps python3-venv tcpdump
)
# Debian would start and enable these; the lab starts its own, and only inside its namespaces.
units=(bird.service bird6.service etcd.service frr.service)

policy=/usr/sbin/policy-rc.d
policy_is_ours=""
install_log=""

say() { printf '%s\n' "$*"; }

fail() {
    printf 'failed  %s\n' "$*" >&2
    exit 1
}

# step TEXT COMMAND...: run it with its output in a file; show a clock on a terminal. If it fails,
# show the end of what it said and stop.
step() {
    local text=$1 begun=$SECONDS pid status=0
    shift
    "$@" >>"$install_log" 2>&1 </dev/null &
    pid=$!
    if [ -t 1 ]; then
        while kill -0 "$pid" 2>/dev/null; do
            printf '\r...     %s (%d s) ' "$text" $((SECONDS - begun))
            sleep 0.5
        done
        printf '\r\033[K'
    else
        say "...     $text"
    fi
    wait "$pid" || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$install_log" >&2
        fail "$text (exit status $status; all of it is in $install_log)"
    fi
    say "ok      $text ($((SECONDS - begun)) s)"
}

check_machine() {
    [ "$(id -u)" -eq 0 ] || fail "this makes network namespaces: run it as root (sudo $0)"
    # shellcheck disable=SC1091
    case "$(. /etc/os-release 2>/dev/null && echo "${ID-} ${ID_LIKE-}")" in
    *debian*) ;;
    *) fail "this installs Debian packages, and this is not Debian" ;;
    esac
}

# Packages must not start their services; a policy that is there already is its owner's.
hold_services() {
    [ -e "$policy" ] && return
    policy_is_ours=yes
    printf '#!/bin/sh\n# Written by the Cymric lab while it installs packages.\nexit 101\n' >"$policy"
    chmod 755 "$policy"
}

release_services() {
    if [ -n "$policy_is_ours" ]; then
        rm -f "$policy"
        policy_is_ours=""
    fi
}

missing_packages() {
    local name
    for name in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] ||
            printf '%s\n' "$name"
    done
}

install_packages() {
    local missing unit were_here=" "
    mapfile -t missing < <(missing_packages)
    if [ "${#missing[@]}" -eq 0 ]; then
        say "ok      Debian packages are here"
        return
    fi
    for unit in "${units[@]}"; do
        [ -e "/lib/systemd/system/$unit" ] && were_here+="$unit "
    done
    export DEBIAN_FRONTEND=noninteractive
    hold_services
    step "Read the package lists" apt-get -q update
    step "Install ${missing[*]}" \
        apt-get -q install -y --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}"
    release_services
    if command -v systemctl >/dev/null; then
        for unit in "${units[@]}"; do
            [[ "$were_here" == *" $unit "* ]] || [ ! -e "/lib/systemd/system/$unit" ] ||
                systemctl --quiet disable "$unit" >>"$install_log" 2>&1 ||
                say "note    $unit could not be disabled; it may start with the machine"
        done
    fi
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -eq 0 ] || fail "still missing after the installation: ${missing[*]}"
}

# The first Python that is new enough and can make a virtual environment.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" /usr/bin/python3 python3.13 python3.12 python3.11 python3; do
        [ -n "$candidate" ] && "$candidate" -c \
            'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
            command -v "$candidate" && return
    done
    fail "no Python 3.11 or newer with venv found (set PYTHON to one)"
}

install_python() {
    local extras=$1 python venv=$root/.venv stamp wanted
    if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$(find_python) || exit 1
        rm -rf "$venv"
        step "Make a virtual environment in .venv" "$python" -m venv "$venv"
    fi
    stamp=$venv/installed-$extras
    # What was installed is right as long as the project's metadata and its place are the same.
    wanted=$( (
        echo "$root"
        "$venv/bin/python" --version
        cat "$root/pyproject.toml"
    ) | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "ok      Python packages are here"
        return
    fi
    step "Install the Python packages into .venv" "$venv/bin/python" -m pip install \
        --quiet --disable-pip-version-check --no-input -e "${root}[$extras]"
    printf '%s\n' "$wanted" >"$stamp"
}

bootstrap() {
    local extras=$1
    check_machine
    install_log=$(mktemp -t cymric-install.XXXXXX)
    trap release_services EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # One at a time; the lock is on this folder, and given back before anything else is started.
    exec 9<"$root"
    flock 9
    install_packages
    install_python "$extras"
    exec 9<&-
    rm -f "$install_log"
}
