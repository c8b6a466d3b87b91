#!/bin/sh
# busybox-rootfs.sh DIR: make DIR a root filesystem for "mydocker.py run --rootfs DIR".
#
# DIR must not exist yet, or be empty. It gets one static busybox, a link for each of its
# applets, and the few files and directories that programs expect. No need to be root.
# The busybox is the file that $BUSYBOX names, or else the first one in PATH.
set -eu
hint="install a static one (Debian, Ubuntu: apt-get install busybox-static) or set BUSYBOX"

die() {
    printf 'busybox-rootfs.sh: %s\n' "$(printf %s "$1" | tr '\n' ' ')" >&2
    exit "${2:-1}"
}
try() { error=$("$@" 2>&1) || die "$error"; }
field() { od -A n -t "$1" -j "$2" -N "$3" "$new/bin/busybox" | tr -d ' \n'; }

is_static() { # 64-bit ELF in which no program header is a PT_INTERP (3): see elf(5)
    [ "$(field x1 0 5)" = 7f454c4602 ] || return 1
    offset=$(field u8 32 8) count=$(field u2 56 2)
    while [ "$count" -gt 0 ]; do
        count=$((count - 1))
        [ "$(field u4 $((offset + 56 * count)) 4)" != 3 ] || return 1
    done
}

fill() { # the && and || matter: "try" tests the status, and that turns "set -e" off
    cd "$new" && mkdir -p sbin usr/bin usr/sbin etc proc sys dev run tmp root var/log var/tmp &&
        chmod 700 root && chmod 1777 tmp var/tmp && ln -s ../run var/run || return
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' >etc/passwd &&
        printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >etc/group &&
        printf '127.0.0.1 localhost\n::1 localhost\n' >etc/hosts || return
    for path in $applets; do # relative links, so that DIR can be moved
        case $path in
            busybox | bin/busybox) continue ;;
            bin/*) target=busybox ;;
            */*/*) target=../../bin/busybox ;;
            */*) target=../bin/busybox ;;
            *) target=busybox path=bin/$path ;;
        esac
        ln -s "$target" "$path" || return
    done
}

case ${1-} in "" | -h | --help) set -- ;; esac
[ $# -eq 1 ] || die "usage: busybox-rootfs.sh DIR" 2
case $1 in /*) dir=$1 ;; *) dir=./$1 ;; esac # a name may start with a dash
[ ! -e "$dir" ] || [ -z "$(ls -A "$dir" 2>&1)" ] || die "$1 exists and is not an empty directory"
busybox=$(command -v busybox) || [ -n "${BUSYBOX:-}" ] || die "no busybox in PATH: $hint"
[ "$busybox" != busybox ] || busybox=/proc/$$/exe # a busybox shell means itself by that
busybox=${BUSYBOX:-$busybox}

umask 022
parent=$(dirname "$dir" && echo .) # the dot, because $() drops newlines at the end
new=${parent%??}/.busybox-rootfs.$$
try mkdir "$new"
trap 'rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM
try install -D -m 755 -- "$busybox" "$new/bin/busybox"
is_static || die "$busybox is not a static 64-bit program: $hint"
applets=$("$new/bin/busybox" --list-full 2>/dev/null) ||
    die "cannot run $busybox: is it for another machine, or $1 on a noexec filesystem?"
try fill
[ -e "$new/bin/sh" ] || die "$busybox has no shell"
try mv -f -T "$new" "$dir"
