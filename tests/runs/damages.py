"""What can be wrong with a folder that has a manifest, for every reader. Each takes the folder and spoils it, and returns the path that is meant now."""

import json
import os
import pickle
import shutil

from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest, read_manifest
from kvcat_nemo.runs.layout import MANIFEST


def with_new_manifest(folder):
    """Somebody who changes a file can write a manifest for it, too: a manifest is no signature."""
    old = read_manifest(folder)
    (folder / MANIFEST).unlink()
    hash_and_write_manifest(folder, old.step, **old.facts)


def flip(path, position=None, bit=2):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(raw)


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def each(act):
    """The same done to every file of the folder, one at a time: a list of damages."""

    def one(name):
        return lambda folder: act(folder / name)

    return lambda folder: [one(path.relative_to(folder)) for path in files(folder)]


def add(name):
    def act(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")

    return act


def linked(path):
    """The same bytes, but elsewhere."""
    outside = path.parent.parent.parent / "elsewhere"
    shutil.move(path, outside)
    path.symlink_to(outside)


def linked_folder(folder):
    shutil.move(folder / "weights", folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")


def edit_manifest(change):
    def act(folder):
        value = json.loads((folder / MANIFEST).read_text())
        change(value)
        (folder / MANIFEST).write_text(json.dumps(value))

    return act


def outside(name):
    """The index names a file that is not in the folder."""

    def act(folder):
        from kvcat_nemo.runs.pickles import read_index

        weights = folder / "weights"
        metadata = read_index(weights)
        secret = folder.parent / "secret.distcp"
        shutil.copyfile(weights / "__0_0.distcp", secret)
        for info in metadata.storage_data.values():
            info.relative_path = name.format(secret=secret)
        (weights / ".metadata").write_bytes(pickle.dumps(metadata))
        with_new_manifest(folder)

    return act


def linked_out(folder):
    """A file of a checkpoint without a manifest is a link out of it."""
    linked(folder / "weights" / "__0_0.distcp")
    (folder / MANIFEST).unlink()


ONE_OF_EACH = {
    "flipped": each(flip),
    "truncated": each(lambda path: os.truncate(path, path.stat().st_size - 1)),
    "longer": each(lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "missing": each(lambda path: path.unlink()),
    "link": each(linked),
}
"""Name → folder → damages of single files."""

WHOLE = {
    "extra weights": add("weights/__7_0.distcp"),
    "extra config": add("config.json"),
    "extra tokenizer": add("hf/tokenizer.json"),
    "linked folder": linked_folder,
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: (folder / MANIFEST).write_text(""),
    "manifest of something else": lambda folder: (folder / MANIFEST).write_text('{"files": ["a"]}'),
    "manifest is a list": lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
    "manifest with another vocabulary": edit_manifest(lambda v: v["facts"].update(vocab_size=32)),
    "manifest of another step": edit_manifest(lambda v: v.update(step=5)),
    "manifest names a file outside": edit_manifest(lambda v: v["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}})),
    "being written": lambda folder: folder.with_name(folder.name + "-unfinished").touch(),
    "set aside": lambda folder: folder.rename(folder.with_name(folder.name + "-broken")),
}  # fmt: skip
"""Name → damage of the folder."""


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, told):
        self.told = told

    def __reduce__(self):
        return os.system, (f"touch '{self.told}'",)


def malicious(told):
    """Name → bytes that run code when pickle.load reads them."""
    command = f"touch '{told}'"
    inner = pickle.dumps(Payload(told))
    return {
        "plain": inner,
        "protocol 0": pickle.dumps(Payload(told), protocol=0),
        "inst opcode": b"(S" + repr(command).encode() + b"\nios\nsystem\n.",
        "eval": b"cbuiltins\neval\n(S" + repr(f"__import__('os').system({command!r})").encode() + b"\ntR.",
        "by attribute": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S"
        + repr(command).encode()
        + b"\ntR.",
        "torch's own unsafe loader": b"ctorch.storage\n_load_from_bytes\n(" + _bytes(inner) + b"tR.",
        "numpy's": b"cnumpy.testing._private.utils\nrunstring\n(S"
        + repr(f"import os; os.system({command!r})").encode()
        + b"\n}tR.",
    }


def _bytes(data):
    return b"B" + len(data).to_bytes(4, "little") + data
