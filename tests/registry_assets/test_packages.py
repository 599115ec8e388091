import zipfile

import pytest
from registry_assets.packages import FetchError, Package, fetch_package

from kvcat_nemo.common.files import sha256_of

FILENAME = "kvcat_example-1.0-py3-none-any.whl"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A real wheel in a folder that stands for the package index, which pip alone is told about."""
    index = tmp_path / "index"
    index.mkdir()
    info = "kvcat_example-1.0.dist-info"
    with zipfile.ZipFile(index / FILENAME, "w") as wheel:
        wheel.writestr("kvcat_example/data.txt", "payload")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvcat-example\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("KVCAT_CACHE", str(tmp_path / "cache"))
    return Package("kvcat-example", "1.0", FILENAME, sha256_of(index / FILENAME), "Apache-2.0")


def test_a_package_is_fetched_once(package, tmp_path):
    said = []
    wheel = fetch_package(package, said.append)
    assert wheel == tmp_path / "cache" / "packages" / FILENAME
    assert zipfile.ZipFile(wheel).read("kvcat_example/data.txt") == b"payload"
    (tmp_path / "index" / FILENAME).unlink()  # now only the cache has it
    assert fetch_package(package, said.append) == wheel
    assert "downloading" in said[0] and "found in" in said[1]
    assert [p.name for p in wheel.parent.iterdir()] == [FILENAME]


def test_a_damaged_file_in_the_cache_is_fetched_again(package):
    wheel = fetch_package(package, lambda _: None)
    wheel.write_bytes(wheel.read_bytes()[:-7])
    assert sha256_of(fetch_package(package, lambda _: None)) == package.sha256


def test_the_cache_is_in_the_working_folder_by_default(package, tmp_path, monkeypatch):
    monkeypatch.delenv("KVCAT_CACHE")
    monkeypatch.chdir(tmp_path)
    fetch_package(package, lambda _: None)
    assert (tmp_path / ".cache" / "packages" / FILENAME).is_file()


def test_without_the_index_the_error_says_what_to_do(package, tmp_path):
    (tmp_path / "index" / FILENAME).unlink()
    with pytest.raises(FetchError) as caught:
        fetch_package(package, lambda _: None)
    message = str(caught.value)
    assert "kvcat-example==1.0: pip could not download it" in message
    assert f"copy {FILENAME} to {tmp_path / 'cache' / 'packages' / FILENAME}" in message
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_another_file_than_the_expected_one_is_refused(package, tmp_path):
    with zipfile.ZipFile(tmp_path / "index" / FILENAME, "a") as wheel:
        wheel.writestr("kvcat_example/more.txt", "tampered")
    with pytest.raises(FetchError, match=f"expected {package.sha256}"):
        fetch_package(package, lambda _: None)
    assert not (tmp_path / "cache" / "packages" / FILENAME).exists()
