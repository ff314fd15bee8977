#!/bin/sh
# Linux only: a BLAS that makes MLX's float32 matrix products 10 to 20 times faster. Uses apt-get
# where that needs no password; otherwise says in one line what to do. Never fails.
[ "$(uname -s)" = Linux ] || exit 0
ldconfig -p 2>/dev/null | grep -q -e libopenblas.so.0 && exit 0
package=libopenblas0-pthread
if command -v apt-get >/dev/null; then
    [ "$(id -u)" = 0 ] && as_root="" || as_root="sudo -n"
    echo "installing $package"
    { $as_root apt-get install -y -qq $package || { $as_root apt-get update -qq &&
        $as_root apt-get install -y -qq $package; }; } >/dev/null 2>&1 && exit 0
fi
echo "note: no fast BLAS; everything works, but slower. On Debian or Ubuntu: sudo apt-get install $package"
