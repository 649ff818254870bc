#!/usr/bin/env bash
# Prepare a Debian 12 machine for Spinetta: Debian packages, a virtual environment, the package in it.
#
#   scripts/setup.sh          what a user needs (with the demonstration)
#   scripts/setup.sh --dev    and what the tests and checks need
#
# May be run again at any time: it does only what is missing, and takes a second when nothing is.
# Works as root, or as a user with sudo. Environment:
#   SPINETTA_VENV   where the virtual environment is (default: .venv beside this repository's README)
#   PYTHON          which Python makes it (default: python3; 3.11 or newer)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SPINETTA_VENV:-$root/.venv}
extras=""
for argument in "$@"; do
    case $argument in
        --dev) extras="[dev]" ;;
        -h | --help)
            sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            echo "setup: unknown argument $argument (there is --dev)" >&2
            exit 2
            ;;
    esac
done

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

log=$(mktemp "${TMPDIR:-/tmp}/spinetta-setup.XXXXXX")
undo=() # what to put back, whatever happens
finish() {
    local status=$?
    for command in "${undo[@]}"; do eval "$command" || true; done
    rm -f "$log"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Run a slow command quietly; when it fails, show the end of what it said.
quietly() {
    "$@" >"$log" 2>&1 </dev/null && return 0
    local status=$?
    tail -n 25 "$log" >&2
    return "$status"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        env DEBIAN_FRONTEND=noninteractive "$@"
    else
        sudo env DEBIAN_FRONTEND=noninteractive "$@"
    fi
}

# --- Debian packages -----------------------------------------------------------------------------------------

usable_python() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }

# What is missing is judged by what is there, not by package names: an etcd of your own serves as well.
missing_packages() {
    has etcd || echo etcd-server
    has etcdctl || echo etcd-client
    has runc || echo runc
    has tini-static || echo tini
    has skopeo || echo skopeo
    has umoci || echo umoci
    has zstd || echo zstd # of images that are compressed with it
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates # skopeo asks registries for their certificates
    has bowtie2 || echo bowtie2
    [ -e /usr/share/doc/bowtie2/examples/reads/reads_1.fq.gz ] || echo bowtie2-examples
    has samtools || echo samtools
    has bcftools || echo bcftools
    has busybox || echo busybox-static # for the image of the demonstration
    usable_python "${PYTHON:-python3}" || echo python3-venv
    if [ -n "$extras" ]; then
        has shellcheck || echo shellcheck
        has git || echo git
        has ps || echo procps
        { has ip && has ss; } || echo iproute2
        has iptables-restore || echo iptables
        has nsenter || echo util-linux
        has nft || echo nftables # containers on the network bridge
        [ -x /usr/lib/cni/ptp ] || [ -x /opt/cni/bin/ptp ] || echo containernetworking-plugins
        compgen -G "/usr/lib/*/faketime/libfaketimeMT.so.1" >/dev/null || echo libfaketime
        { has dockerd && has docker; } || echo docker.io # a client alone starts nothing
        has docker-compose || echo docker-compose
        has docker-registry || echo docker-registry
        has crun || echo crun
        [ "$(uname -m)" != x86_64 ] || has linux.uml || echo user-mode-linux # machines of another kind, see tests/machines
        has newuidmap || echo uidmap
        has xz || echo xz-utils # root file systems of the tests
        [ -e /usr/share/gocode/src/github.com/opencontainers/runtime-spec/schema ] || echo golang-github-opencontainers-specs-dev
        # Not only `busybox`: one that needs libraries does not run in an image that has none.
        [ "$(dpkg-query --show --showformat='${db:Status-Status}' busybox-static 2>/dev/null)" = installed ] || echo busybox-static
    fi
}

# Some of Debian's packages start a system service when they are installed and at every boot: etcd on port 2379,
# docker-registry on 5000, dockerd and containerd. Spinetta and its tests start these themselves, on ports and in directories of
# their own, so the services are kept from starting during this installation, and are left disabled. A service that was
# there before is not touched: then there is nothing to install.
services_of() {
    local package
    for package in "$@"; do
        case $package in
            etcd-server) echo etcd.service ;;
            docker-registry) echo docker-registry.service ;;
            containernetworking-plugins) printf '%s\n' cni-dhcp.service cni-dhcp.socket ;;
            docker.io)
                printf '%s\n' docker.service docker.socket
                # It brings containerd with it, but where that is there already, somebody may be using it.
                has containerd || echo containerd.service
                ;;
        esac
    done
}

hold_back_services() {
    local services=("$@") names=("${@%.*}")
    if [ -d /run/systemd/system ]; then
        as_root systemctl mask --quiet "${services[@]}" 2>/dev/null || die "could not mask ${services[*]}"
        undo+=("as_root systemctl unmask --quiet ${services[*]} 2>/dev/null")
        undo+=("as_root systemctl disable --quiet ${services[*]} 2>/dev/null")
        say "left disabled: ${services[*]}; Spinetta starts what it needs itself (systemctl enable --now … gives you Debian's)"
    elif [ ! -e /usr/sbin/policy-rc.d ]; then
        # Asked by Debian's packages before they start a service.
        as_root tee /usr/sbin/policy-rc.d >/dev/null <<POLICY
#!/bin/sh
# Temporary, from Spinetta's scripts/setup.sh: start everything but what it installs.
case " ${names[*]} " in *" \$1 "*) exit 101 ;; esac
POLICY
        as_root chmod 755 /usr/sbin/policy-rc.d
        undo+=("as_root rm -f /usr/sbin/policy-rc.d")
    fi
}

install_packages() {
    local packages=("$@")
    has apt-get || die "this is not Debian (no apt-get). Install what these Debian packages hold, then run this again:" \
        "  ${packages[*]}"
    if [ "$(id -u)" -ne 0 ] && ! has sudo; then
        die "these Debian packages are missing, and you are neither root nor have sudo: ${packages[*]}" \
            "Ask an administrator for: apt-get install ${packages[*]}"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || say "sudo may ask for your password, to install Debian packages"
        sudo true || die "sudo did not let us in; ask an administrator for: apt-get install ${packages[*]}"
    fi
    local services
    mapfile -t services < <(services_of "${packages[@]}")
    [ ${#services[@]} -eq 0 ] || hold_back_services "${services[@]}"
    say "installing Debian packages: ${packages[*]}"
    # The package lists may be absent or old, and fetching them is slow: only if it does not work without.
    # Slim images leave out /usr/share/doc, where bowtie2-examples keeps its data: hence path-include and reinstall.
    local install=(apt-get install -y --no-install-recommends --reinstall
        -o "DPkg::Options::=--path-include=/usr/share/doc/bowtie2/examples/*" "${packages[@]}")
    if ! as_root "${install[@]}" >"$log" 2>&1 </dev/null; then
        say "fetching the package lists"
        quietly as_root apt-get update || die "apt-get update failed: is there a network?"
        quietly as_root "${install[@]}" || die "apt-get could not install: ${packages[*]}"
    fi
}

mapfile -t packages < <(missing_packages)
if [ ${#packages[@]} -gt 0 ]; then
    install_packages "${packages[@]}"
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} -eq 0 ] || die "still missing after the installation: ${packages[*]}"
fi

# --- the virtual environment -----------------------------------------------------------------------------------

python=${PYTHON:-python3}
usable_python "$python" || python=/usr/bin/python3
usable_python "$python" || die "Python 3.11 or newer with venv is needed; set PYTHON to one ($("$python" --version 2>&1))"

# Made anew when its Python is gone, brought up to date when what we depend on has changed.
if [ -e "$venv" ] && ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    [ -e "$venv/pyvenv.cfg" ] || die "$venv is there and is no virtual environment; set SPINETTA_VENV to another place"
    say "the virtual environment $venv does not work any more: making it anew"
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    say "making the virtual environment $venv ($("$python" --version))"
    quietly "$python" -m venv "$venv" || die "could not make $venv"
fi

wanted="$(sha256sum <"$root/pyproject.toml" | cut -d' ' -f1) $root"
mark=$venv/.spinetta-setup
if [ -z "$extras" ] && [ -e "${mark}[dev]" ]; then extras="[dev]"; fi # once for development, always
if [ "$(cat "${mark}${extras}" 2>/dev/null)" != "$wanted" ] || ! "$venv/bin/python" -c 'import spinetta' 2>/dev/null; then
    say "installing spinetta$extras and what it needs into $venv"
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --editable "$root$extras" ||
        die "pip could not install spinetta$extras (see above; without a network it cannot)"
    rm -f "$mark" "${mark}[dev]"
    printf '%s\n' "$wanted" >"${mark}${extras}"
fi
# --- a newer etcd, for the tests ---------------------------------------------------------------------------------

# Debian 12's etcd is 3.4. What concerns etcd's members is tested with 3.5 as well: the program of Debian 13, unpacked
# into the virtual environment and not installed. It comes from the mirror that apt uses; apt checks its signature.
newer_suite=trixie
newer_known="3.5.16-4 amd64 0875921bb0d023f2af9b8e15cdfbe417a03e65731345fb832c40f9c2dd72967b"
newer=$venv/share/spinetta/etcd-newer

debian_mirror() {
    local codename
    codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    apt-get indextargets --format "\$(RELEASE) \$(COMPONENT) \$(REPO_URI)" "Created-By: Packages" |
        awk -v release="$codename" '$1 == release && $2 == "main" && !found { found = 1; print $3 }'
}

# In $work: apt's lists of one suite only, and the package. What it prints last is why it failed.
fetch_newer_etcd() {
    local work=$1 mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    if ! has apt-get || ! has dpkg-deb; then echo "this is not Debian" && return 1; fi
    mirror=$(debian_mirror)
    if [ -z "$mirror" ]; then # apt tells only of those whose lists it has
        if [ "$(id -u)" -eq 0 ] || sudo -n true; then as_root apt-get update; fi
        mirror=$(debian_mirror)
    fi
    [ -n "$mirror" ] || { echo "apt has no mirror of this Debian" && return 1; }
    mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/unpacked"
    local trusted=""
    if [ -e "$keyring" ]; then trusted="[signed-by=$keyring] "; fi
    echo "deb $trusted$mirror $newer_suite main" >"$work/sources.list"
    local apt=(apt-get -q -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o "Dir::State=$work/state" -o "Dir::Cache=$work/cache" -o Dir::State::status=/var/lib/dpkg/status
        -o Acquire::Languages=none -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o APT::Sandbox::User=root)
    "${apt[@]}" update || { echo "apt could not read the lists of $newer_suite" && return 1; }
    (cd "$work" && "${apt[@]}" download etcd-server) || { echo "apt could not fetch etcd-server" && return 1; }
    local packages=("$work"/etcd-server_*.deb) known
    read -ra known <<<"$newer_known"
    if [ "$(dpkg-deb --show --showformat="\${Version} \${Architecture}" "${packages[0]}")" = "${known[*]:0:2}" ]; then
        echo "${known[2]}  ${packages[0]}" | sha256sum --check --quiet || return 2
    fi # else it is a later one, by Debian's signature
    dpkg-deb --extract "${packages[0]}" "$work/unpacked" || { echo "it cannot be unpacked" && return 1; }
    "$work/unpacked/usr/bin/etcd" --version || { echo "its etcd does not run here" && return 1; }
    install -D -m 755 "$work/unpacked/usr/bin/etcd" "$newer/etcd.new" && mv "$newer/etcd.new" "$newer/etcd"
}

if [ -n "$extras" ] && [ ! -x "$newer/etcd" ]; then
    say "fetching etcd of Debian $newer_suite for the tests"
    work=$(mktemp -d "${TMPDIR:-/tmp}/spinetta-etcd.XXXXXX")
    undo+=("rm -rf '$work'")
    mkdir -p "$newer"
    status=0
    fetch_newer_etcd "$work" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -eq 0 ]; then
        rm -f "$newer/missing"
    elif [ "$status" -eq 2 ]; then
        die "etcd-server of Debian $newer_suite is not what it was: its checksum is wrong"
    else
        # The tests with it are then skipped, and say so, with this reason.
        tail -n 1 "$log" >"$newer/missing"
        say "WARNING: there is no newer etcd to test with: $(tail -n 5 "$log")"
    fi
fi

say "ready: $venv/bin/spinetta"
