#!/usr/bin/env bash
# The tests of the kernels on an emulated Sapphire Rapids, for the instruction sets that this machine may lack: AVX-512,
# AVX512-BF16 and AMX. Fails unless the guest offers all levels and every test passes there. It proves results, not speed.
# All tests take hours; with FILTER, only those whose names contain it run.
#
# Usage: runs/emulated-levels.sh KERNEL [FILTER...]     a Linux kernel (vmlinuz, 5.16 or later)
#
# Needs on PATH: cpio, xorriso, a static busybox, and bochs, configured with --enable-x86-64 --enable-avx --enable-evex
# --enable-amx --with-nogui and without a debugger; isolinux where Debian puts it; the Rust target x86_64-unknown-linux-musl.
# Bochs as of its commit 783b58fd6 has faults that have to be mended first (docs/LOG.md, 2026-11-25): it lacks XFD, without
# which Linux does not use AMX, its XSAVE loses half of each tile when tasks switch, and its vdpbf16ps takes displacements
# four bytes at a time instead of 64.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kernel="$(realpath "$1")"
shift
log="$PWD/target/emulated-levels.log"
share="${BXSHARE:-$(dirname "$(command -v bochs)")/../share/bochs}"
target=x86_64-unknown-linux-musl
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{root/{bin,tests,proc,dev},iso}

# The tests, static and stripped.
cargo test --release --target "$target" -p kvfold-kernels --lib --test fast_matches_reference --no-run \
    --message-format json |
    python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("executable") and message["profile"]["test"]:
        print(message["target"]["name"], message["executable"])' |
    while read -r name path; do strip -o "$scratch/root/tests/$name" "$path"; done
cargo build --release --target "$target" -p kvfold-kernels --example levels
strip -o "$scratch/root/bin/levels" "target/$target/release/examples/levels"
cp "$(command -v busybox)" "$scratch/root/bin/busybox"

echo "$*" > "$scratch/root/filters"
cat > "$scratch/root/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin PROPTEST_CASES=16
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
echo "guest: kernel $(uname -r), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2)"
echo "guest: flags $(grep -m1 ^flags /proc/cpuinfo | tr ' ' '\n' | grep -E '^(avx2|fma|avx512|amx)' | tr '\n' ' ')"
echo "guest: levels $(levels | tr '\n' ' ')"
failed=
for test in /tests/*; do
    echo "guest: $test"
    "$test" --test-threads 1 $(cat /filters) || failed=yes
done
[ -n "$failed" ] || echo "guest: all tests passed"
sleep 1
poweroff -f
INIT
chmod +x "$scratch/root/init"
(cd "$scratch/root" && find . | cpio --quiet -o -H newc -R 0:0 | gzip -1) > "$scratch/iso/initrd"

cp "$kernel" "$scratch/iso/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$scratch/iso/"
# With ERMS or FSRM, Linux does not survive patching itself in this emulator.
cat > "$scratch/iso/isolinux.cfg" <<'BOOT'
default linux
label linux
  kernel /vmlinuz
  append initrd=/initrd console=ttyS0 nokaslr mitigations=off tsc=reliable random.trust_cpu=on panic=-1 clearcpuid=erms,fsrm
BOOT
xorriso -as mkisofs -quiet -o "$scratch/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
    -boot-info-table "$scratch/iso"

cat > "$scratch/bochsrc" <<BOCHS
display_library: nogui
cpu: model=sapphire_rapids, count=1, ips=100000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=$share/BIOS-bochs-latest, options=fastboot
vgaromimage: file=$share/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$scratch/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$log
clock: sync=none
panic: action=fatal
log: $scratch/bochs.log
BOCHS
: > "$log"
# Powering off ends bochs with an error as well, so what counts is what the guest said.
bochs -q -f "$scratch/bochsrc" > /dev/null 2>&1 < /dev/null || true
grep -a "^guest:\|^test result" "$log" || tail -n 20 "$scratch/bochs.log"
grep -aq "^guest: levels Portable Avx2 Avx512 Avx512Bf16 AmxBf16" "$log"
grep -aq "^test result: ok. [1-9]" "$log" && grep -aq "^guest: all tests passed" "$log"
