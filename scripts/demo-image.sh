#!/usr/bin/env bash
# The image of the demonstration: a root file system with what its steps run, made of this machine's own files.
#
#   scripts/demo-image.sh FILE.tar
#
# bowtie2, samtools and bcftools with the libraries that they are linked with, bash, busybox for the rest: some 15 MiB,
# no network, no root needed. The same programs give the same bytes. `spinetta image import FILE.tar` takes it, and so do
# `docker import FILE.tar` and `tar -x` for plain runc.
#
# The programs `bowtie2` and `bowtie2-build` of Debian are wrappers in Perl and Python, which choose between the programs for
# small and for large genomes. Here they are two lines of shell for the small ones: no Perl, no Python in the image.
set -euo pipefail

case ${1:-} in
    -h | --help | "")
        sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
target=$1
die() {
    printf 'demo-image: %s\n' "$@" >&2
    exit 1
}

programs=(busybox bash split gzip samtools bcftools bowtie2-align-s bowtie2-build-s)
links=(sh cat chmod cp cut date dirname echo env false grep head id kill ls mkdir mktemp mv nproc ps rm rmdir sed sleep
    sort stat tail tar test touch tr true uname wc zcat)

paths=()
for program in "${programs[@]}"; do
    path=$(PATH=/usr/bin:/bin command -v "$program") ||
        die "$program is not there; scripts/setup.sh installs it"
    paths+=("$path")
done

# Beside the target and renamed at the end: a file that is there is whole.
work=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"/usr/{bin,lib,lib64,sbin} "$root"/{dev,etc,proc,run,sys,tmp,work}
chmod 1777 "$root/tmp"
for folder in bin lib lib64 sbin; do ln -s "usr/$folder" "$root/$folder"; done
printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'task:x:1000:1000:task:/work:/bin/sh' >"$root/etc/passwd"
printf '%s\n' 'root:x:0:' 'task:x:1000:' >"$root/etc/group"

# What a program needs at run time, as the dynamic linker says; it is in the image where it is here.
linked=$(ldd "${paths[@]}" 2>/dev/null) || true # not of busybox, which is linked with nothing
if grep -F 'not found' <<<"$linked" >&2; then die "libraries are missing"; fi
mapfile -t libraries < <(sed -nE 's/^\t.*=> (\/[^ ]+) .*/\1/p; s/^\t(\/[^ ]+) .*/\1/p' <<<"$linked" | sort -u)
[ ${#libraries[@]} -gt 0 ] || die "ldd tells of no libraries"
for path in "${libraries[@]}"; do install -D -m 755 "$path" "$root$path"; done
for path in "${paths[@]}"; do install -m 755 "$path" "$root/usr/bin/"; done
for name in "${links[@]}"; do ln -s busybox "$root/usr/bin/$name"; done
for name in align build; do
    wrapper=$root/usr/bin/bowtie2-$name
    printf '#!/bin/sh\nexec bowtie2-%s-s --wrapper basic-0 "$@"\n' "$name" >"$wrapper"
    chmod 755 "$wrapper"
done
mv "$root/usr/bin/bowtie2-align" "$root/usr/bin/bowtie2"

tar --create --file "$work/image.tar" --directory "$root" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner .
mv -f "$work/image.tar" "$target"
echo "demo-image: $target, $(($(stat -c %s "$target") >> 20)) MiB, $((${#libraries[@]})) libraries"
