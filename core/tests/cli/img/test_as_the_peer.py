"""Every line of these tables does the same by qemu-img and by this program called so: output, errors, status, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from .peer import compare, needs_peer

pytestmark = needs_peer

WORDS = """
foo
--foo
-x
-x create
create
create --foo
create -Z
create -Zq
create -qZq a
create a -Zq
create -f
create --objec
create --output=x
create x 1M 2M
create x 1M -q -f raw
info
info a b
info -U
info --output=x a.qcow2
info --back
info --o
info --backing-chain=1 x
info --help=
info --image-opts -Zq
info -f raw a.qcow2 --output json
info a.qcow2 b.qcow2 -U
info -- -f
info --backing -- c.qcow2
check --ouput
check
check -r foo a.qcow2
check --output=foo a.qcow2
check -T foo a.qcow2
map --start-offse
map
map --start-offset=foo r.raw
map --start-offset=9E r.raw
map --max-length=-1 r.raw
snapshot
snapshot -l -c s2 a.qcow2
snapshot -c a -d b a.qcow2
snapshot -c x a b
snapshot -f qcow2 -l a.qcow2
resize
resize 2M
resize a.qcow2
resize a.qcow2 1M b
resize --preallocation=foo a.qcow2 1M
resize -t foo a.qcow2 2M
amend
amend a.qcow2
amend -o compat=0.10
amend -o , a.qcow2
amend -t foo -o compat=1.1 a.qcow2
amend -o compat=1.1 a.qcow2 b.qcow2
bitmap
bitmap a.qcow2 b
bitmap --add a.qcow2 b c
bitmap --add -g foo a.qcow2 c
bitmap -g 64k --remove a.qcow2 c
bitmap --add -F qcow2 a.qcow2 f
bitmap --add -b a.qcow2 a.qcow2 f
bitmap --add -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2 zz
-T
-T foo info a.qcow2
--trace foo info a.qcow2
info --object foo a.qcow2
info --object secret,id=x a.qcow2
info --object secret a.qcow2
info --object secret,help a.qcow2
info --object secret,id=x,data=a a.qcow2
info --object secret,id=x,file=secret a.qcow2
"""

OPENING = """
info nofile
info dir
info nodir/a
info a.qcow2/
info a.qcow2/x
info ''
info -f qcow3 a.qcow2
info -f '' a.qcow2
info -f help a.qcow2
info -f qcow2 r.raw
info -f raw a.qcow2
info foo:bar
info file:a.qcow2
info file:nofile
info --image-opts file.filename=nofile
info --image-opts driver=qcow2,file.filename=nofile
info --image-opts driver=qcow3,file.filename=a.qcow2
info --image-opts driver=qcow2,file.filename=a.qcow2,foo=bar
info --image-opts file.filename=a.qcow2,file.foo=bar
info --image-opts filename=a.qcow2
info --image-opts -f qcow2 file.filename=a.qcow2
info --image-opts a.qcow2
info --image-opts =a
info --image-opts driver=qcow2,filename=a.qcow2
info --image-opts driver=file,filename=a.qcow2
info --image-opts driver=qcow2
info --image-opts driver=qcow2,file=a.qcow2
info --image-opts file=a.qcow2
info --image-opts file.driver=file,file.filename=a.qcow2
info --image-opts driver=qcow2,file.driver=foo,file.filename=a.qcow2
info --image-opts driver=qcow2,file.driver=file
info --image-opts driver=raw,file.filename=r.raw,offset=foo
info --image-opts driver=raw,file.filename=r.raw,offset=1k
info --image-opts driver=raw,file.filename=r.raw,offset=1E
info --image-opts driver=raw,file.filename=r.raw,size=4k
info --image-opts driver=raw,file.filename=r.raw,size=100
info --image-opts driver=raw,file.filename=r.raw,size=4M
info --image-opts -U force-share=off,driver=qcow2,file.filename=a.qcow2
info --image-opts force-share=on,driver=qcow2,file.filename=a.qcow2
info --image-opts driver=qcow2,file.filename=a.qcow2,lazy-refcounts=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,cache.direct=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,discard=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,read-only=foo
info --image-opts driver=qcow2,file.filename=a.qcow2,node-name=1
info --image-opts driver=qcow2,file.filename=a.qcow2,file=x
info --image-opts driver=qcow2,file.filename=a.qcow2,l2-cache-size=foo
map --image-opts driver=qcow2,file.filename=b.qcow2,backing.file.filename=nofile
map --image-opts driver=qcow2,file.filename=b.qcow2,backing=nofile
map --image-opts driver=qcow2,file.filename=b.qcow2,backing.driver=raw,backing.file.filename=r.raw
map --image-opts driver=qcow2,file.filename=a.qcow2,backing.driver=qcow2
info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","file":{"filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","file.filename":"a.qcow2"}'
info 'json:{"file.filename":"a.qcow2"}'
info "json:{'driver':'raw','file.filename':'r.raw'}"
info 'json:{"driver":"qcow2","file":"x"}'
info 'json:{"driver":1}'
info 'json:{"driver":"qcow2","lazy-refcounts":"on","file":{"filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","lazy-refcounts":1,"file":{"filename":"a.qcow2"}}'
info 'json:{"driver":"qcow2","foo":1,"file":{"driver":"file","filename":"a.qcow2"}}'
info 'json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"r.raw"}}}'
info json:
info 'json:{}'
info 'json:[]'
info 'json:{,}'
info 'json:{"a":1}x'
info 'json:{"driver":"qcow2","file":'
check orphan.qcow2
map orphan.qcow2
snapshot -c x nofile
bitmap --add nofile f
amend -o compat=1.1 nofile
amend -f qcow2 -o compat=1.1 r.raw
resize nofile 1M
resize -f qcow2 r.raw 1M
check -U -r all a.qcow2
snapshot -U -c x a.qcow2
"""

INFO = """
info a.qcow2
info b.qcow2
info c.qcow2
info r.raw
info odd.raw
info empty
info -f raw empty
info old.qcow2
info small.qcow2
info snap.qcow2
info bm.qcow2
info meta.qcow2
info orphan.qcow2
info sub/up.qcow2
info ./b.qcow2
info compressed.qcow2
info --output=json a.qcow2
info --output=json b.qcow2
info --output=json r.raw
info --output=json snap.qcow2
info --output=json bm.qcow2
info --output=json sub/up.qcow2
info --output human a.qcow2
info --backing-chain c.qcow2
info --backing-chain --output=json c.qcow2
info --backing-chain orphan.qcow2
info --backing-chain loop1.qcow2
info --backing-chain r.raw
info --backing-chain --output=json r.raw
info --backing-chain sub/up.qcow2
info -U --backing-chain c.qcow2
snapshot -l snap.qcow2
snapshot -l a.qcow2
snapshot -l r.raw
snapshot -q -l snap.qcow2
snapshot snap.qcow2
snapshot -l --image-opts driver=qcow2,file.filename=snap.qcow2
"""

MAP = """
map a.qcow2
map b.qcow2
map c.qcow2
map r.raw
map odd.raw
map -f raw odd.raw
map empty
map onraw.qcow2
map small.qcow2
map meta.qcow2
map compressed.qcow2
map -f raw b.qcow2
map --output=json a.qcow2
map --output=json b.qcow2
map --output=json c.qcow2
map --output=json r.raw
map --output=json odd.raw
map --output=json empty
map --output=json onraw.qcow2
map --output=json meta.qcow2
map --output=json compressed.qcow2
map --output=json snap.qcow2
map --start-offset=64k --output=json c.qcow2
map --start-offset=65537 --max-length=300000 --output=json c.qcow2
map --start-offset=100 --max-length=1000 c.qcow2
map --start-offset=10M --output=json c.qcow2
map --start-offset=10M c.qcow2
map --max-length=0 --output=json c.qcow2
map --max-length=1 --output=json r.raw
map -s 1k -l 2k --output=json r.raw
map --image-opts driver=raw,offset=512,file.filename=r.raw
map --output=json --image-opts driver=raw,offset=512,size=4k,file.filename=r.raw
"""

CHECK = """
check a.qcow2
check b.qcow2
check r.raw
check -f raw r.raw
check snap.qcow2
check meta.qcow2
check compressed.qcow2
check -q a.qcow2
check --output=json a.qcow2
check --output=json compressed.qcow2
check leak.qcow2
check --output=json leak.qcow2
check -r leaks leak.qcow2
check -r all leak.qcow2
check -q -r all leak.qcow2
check --output=json -r leaks leak.qcow2
check damaged.qcow2
check --output=json damaged.qcow2
check -r leaks damaged.qcow2
check -r all damaged.qcow2
check --output=json -r all damaged.qcow2
check -T none a.qcow2
check nofile
"""

CREATE = """
create x 1M
create -f raw x 100
create -f raw -o size=100 x
create -f raw x
create -f raw x foo
create -f raw x -- -1
create -f raw x 9E
create -f raw x 1.5
create -f raw x 1.5k
create -f raw -o preallocation=full x 1M
create -f raw -o preallocation=falloc x 1M
create -f raw -o nocow=off x 1M
create -f qcow2 x 1M
create -f qcow2 x 1000
create -f qcow2 x 0
create -q -f qcow2 x 1M
create -f qcow2 -o size=1M x
create -f qcow2 -o size=1M x 2M
create -f qcow2 -o size=foo x
create -f qcow2 -o size=-1 x
create -f qcow2 -o cluster_size=foo x 1M
create -f qcow2 -o cluster_size=3k x 1M
create -f qcow2 -o cluster_size=99999999999999999999 x 1M
create -f qcow2 -o lazy_refcounts=foo x 1M
create -f qcow2 -o lazy_refcounts x 1M
create -f qcow2 -o nolazy_refcounts x 1M
create -f qcow2 -o lazy_refcounts=yes,size=1.5M x
create -f qcow2 -o lazy_refcounts -o refcount_bits=1 -o lazy_refcounts=off x 1M
create -f qcow2 -o refcount_bits=foo x 1M
create -f qcow2 -o refcount_bits=7 x 1M
create -f qcow2 -o foo=1 x 1M
create -f qcow2 -o preallocation=foo x 1M
create -f qcow2 -o preallocation=metadata x 1M
create -f qcow2 -o preallocation=full x 128k
create -f qcow2 -o compat=foo x 1M
create -f qcow2 -o compat=0.10 x 1M
create -f qcow2 -o compat=v3 x 1M
create -f qcow2 -o compat=0.10,lazy_refcounts=on x 1M
create -f qcow2 -o compression_type=foo x 1M
create -f qcow2 -o compression_type=zstd x 1M
create -f qcow2 -o =1 x 1M
create -f qcow2 -o , x 1M
create -f qcow2 -o '' x 1M
create -f qcow2 -o a=b, x 1M
create -f qcow2 -o a=b,,c x 1M
create -f qcow2 x 8191P
create -f qcow2 -o cluster_size=512 x 1P
create -f qcow2 -o backing_file=nofile x 1M
create -f qcow2 -b nofile -F qcow2 x 1M
create -f qcow2 -b nofile -F foo x 1M
create -f qcow2 -b nofile x
create -f qcow2 -b a.qcow2 x
create -f qcow2 -b a.qcow2 -F qcow2 x
create -f qcow2 -b a.qcow2 -F qcow2 x 4M
create -f qcow2 -b odd.raw -F raw x
create -f qcow2 -b r.raw -F qcow2 x
create -f qcow2 -b orphan.qcow2 -F qcow2 x
create -f qcow2 -u -b nofile x 1M
create -f qcow2 -u -b nofile x
create -f qcow2 -u -b nofile -F raw x
create -f qcow2 -u -b nofile -F raw x 1M
create -f qcow2 -u -F foo -b y x 1M
create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 x
create -f qcow2 -b a.qcow2 -o backing_file=b.qcow2,backing_fmt=qcow2 x
create -f qcow2 -o backing_file=a,,b -u -F raw x 1M
create -f raw -b a.qcow2 x 1M
create -f raw -b a.qcow2 -F qcow2 x 1M
create -f raw -F qcow2 x 1M
create -f qcow2 -F qcow2 x 1M
create -f qcow2 -b x -F raw x 1M
create -f qcow2 -b ./x -u -F raw x 1M
create -f qcow2 -b '' x 1M
create -f qcow2 -b '' -F qcow2 x 1M
create -f qcow2 -b b.qcow2 -F qcow2 sub/x
create -f qcow2 -b ../b.qcow2 -F qcow2 sub/x
create -f qcow2 -F qcow2 -b 'json:{"driver":"qcow2","file.filename":"b.qcow2"}' x
create -f qcow2 -F qcow2 -b file:b.qcow2 x
create -f qcow2 -F qcow2 -b nbd:unix:x -u x 1M
create -o help=1 x 1
create -f qcow2 nodir/x 1M
create -f qcow2 dir 1M
create -f raw dir 1M
create -f foo x 1M
create -f foo -o help x
create -f foo -o help
create -f qcow2 foo:x 1M
create -f qcow2 -e x 1M
create -f raw -o help
create -f raw -o help x
create -f file -o help
create -f raw -o '?' x
create -f raw -o size=1M,help x
create -f raw -o size=help x
create -f qcow2 -o help
create -f qcow2 -o help x
create -f qcow2 a.qcow2 2M
create -f raw a.qcow2 2M
"""

CHANGE = """
resize a.qcow2 2M
resize a.qcow2 +1M
resize a.qcow2 +1
resize a.qcow2 1000000
resize a.qcow2 512k
resize --shrink a.qcow2 512k
resize --shrink a.qcow2 -512k
resize --shrink a.qcow2 -1M
resize --shrink a.qcow2 0
resize a.qcow2 -1
resize a.qcow2 1M
resize a.qcow2 +
resize a.qcow2 +-1
resize a.qcow2 foo
resize a.qcow2 ''
resize a.qcow2 1x
resize a.qcow2 8E
resize a.qcow2 9E
resize a.qcow2 18446744073709551616
resize a.qcow2 0x200000
resize -q a.qcow2 2M
resize b.qcow2 4M
resize snap.qcow2 2M
resize bm.qcow2 2M
resize r.raw 2M
resize -f raw r.raw 2M
resize -f raw r.raw +100
resize -f raw --shrink r.raw 100
resize -f raw --preallocation=falloc r.raw 2M
resize -f raw --preallocation=full r.raw 2M
resize -f raw --preallocation=metadata r.raw 2M
resize --preallocation=off a.qcow2 2M
resize --preallocation=metadata a.qcow2 2M
resize --preallocation=falloc a.qcow2 2M
resize --preallocation=full a.qcow2 2M
resize --preallocation=full --shrink a.qcow2 512k
snapshot -a nos snap.qcow2
snapshot -d nos snap.qcow2
snapshot -a one snap.qcow2
snapshot -d one snap.qcow2
snapshot -d 2 snap.qcow2
snapshot -c x r.raw
snapshot -d x r.raw
amend -o help a.qcow2
amend -o help nofile
amend -f qcow2 -o help
amend -f raw -o help
amend -f foo -o help
amend -o foo=1 a.qcow2
amend -o cluster_size=4k a.qcow2
amend -o size=foo a.qcow2
amend -o size=2M a.qcow2
amend -o backing_file=x b.qcow2
amend -o lazy_refcounts=on a.qcow2
amend -o lazy_refcounts=foo a.qcow2
amend -o compat=foo a.qcow2
amend -o compat=0.10 a.qcow2
amend -p -o compat=0.10 a.qcow2
amend -q -p -o compat=1.1 old.qcow2
amend -o refcount_bits=7 a.qcow2
amend -o refcount_bits=32 a.qcow2
amend -o preallocation=full a.qcow2
amend -o foo=1 r.raw
amend -o data_file=foo a.qcow2
amend -o data_file_raw=on a.qcow2
bitmap --add a.qcow2 b
bitmap --add bm.qcow2 bm0
bitmap --remove bm.qcow2 bm0
bitmap --remove bm.qcow2 nob
bitmap --clear bm.qcow2 nob
bitmap --clear bm.qcow2 bm0
bitmap --enable bm.qcow2 bm1
bitmap --disable bm.qcow2 bm0
bitmap --merge nob bm.qcow2 bm0
bitmap --merge bm0 bm.qcow2 nob
bitmap --merge bm0 bm.qcow2 bm1
bitmap --add --merge bm0 bm.qcow2 bm2
bitmap --add -g 3 bm.qcow2 c
bitmap --add -g 256 bm.qcow2 c
bitmap --add -g 4G bm.qcow2 c
bitmap --add -g 0 bm.qcow2 c
bitmap --add r.raw f
bitmap --merge f r.raw f
bitmap --add bm.qcow2 ''
bitmap --add old.qcow2 f
bitmap --add --merge bm0 -b bm.qcow2 -F qcow2 a.qcow2 z
bitmap --add --merge bm0 -b nofile a.qcow2 z
bitmap --remove --add --disable bm.qcow2 bm0
"""


#: Lines after which files differ by design: the time stamps of snapshots.
def _lines(text: str) -> list[str]:
    return [line for line in text.strip().splitlines() if line]


@pytest.mark.parametrize("line", _lines(WORDS))
def test_command_lines_are_understood_and_refused_alike(line: str, base: Path, tmp_path: Path) -> None:
    """Options, their abbreviations and order, and what is said of wrong ones."""
    compare(line, base, tmp_path, files=False)


@pytest.mark.parametrize("line", _lines(OPENING))
def test_images_are_named_and_fail_to_open_alike(line: str, base: Path, tmp_path: Path) -> None:
    """Plain names, options and JSON name the same images, and errors are told in the same words."""
    compare(line, base, tmp_path, files=False)


@pytest.mark.parametrize("line", _lines(INFO))
def test_information_is_told_alike(line: str, base: Path, tmp_path: Path) -> None:
    """``info`` and ``snapshot -l``, for people and for programs."""
    compare(line, base, tmp_path)


@pytest.mark.parametrize("line", _lines(MAP))
def test_maps_are_told_alike(line: str, base: Path, tmp_path: Path) -> None:
    """``map``, for people and for programs."""
    compare(line, base, tmp_path, files=False)


@pytest.mark.parametrize("line", _lines(CHECK))
def test_images_are_checked_and_repaired_alike(line: str, base: Path, tmp_path: Path) -> None:
    """``check``: what is found, what is mended, and the status."""
    compare(line, base, tmp_path)


@pytest.mark.parametrize("line", _lines(CREATE))
def test_images_are_created_alike(line: str, base: Path, tmp_path: Path) -> None:
    """``create``: what is said, what is refused and in which order, and every byte of the new image."""
    compare(line, base, tmp_path)


@pytest.mark.parametrize("line", _lines(CHANGE))
def test_images_are_changed_alike(line: str, base: Path, tmp_path: Path) -> None:
    """``resize``, ``snapshot``, ``amend``, ``bitmap``: what is said and every byte of the image."""
    compare(line, base, tmp_path)
