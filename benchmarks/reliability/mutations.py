"""Ways to damage a file: bytes, safetensors headers, JSON trees, YAML, lists and images. All follow from an rng.

A mutation is a function of (content, rng); what it returns may be anything at all.
"""

import copy
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Tree = dict[str, Any]
Content = tuple[Tree, bytes]
"""A safetensors file's header, parsed, and its body."""

NINES = "nine" * 8
"""Stands for a number of 5000 digits, which Python refuses to print."""
NASTY: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        7,
        64,
        4096,
        2**31,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        10**18,
        -(10**18),
        10**300,
    ),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), NINES),
    *("", " ", "x" * 10_000, "../../../etc/passwd", "/etc/passwd", "\0", "a\0b", "a\nb", "\x1b[2J", "\ud800", "é", "1"),
    *("NaN", "__class__", "{}", "timm:hf_hub:a/b", "F32", "os.system('id')", "!!python/object/apply:os.system [id]"),
    *([], [[]], [None], [1], [1, 2, 3], ["a", "b"], ["a"] * 1000, [10**18] * 4, [0] * 4, [-5, 25, 14, 15], {}),
    *({"a": 1}, {"": {}}, {"name": "x"}, {"__proto__": 1}),
]
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "U64",
    "x",
    "",
    "f16",
)


def parsed(content: bytes) -> Content:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Tree | str, body: bytes, size: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else dumped(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def dumped(tree: Any) -> str:
    return json.dumps(tree).replace(f'"{NINES}"', "9" * 5000)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a tree."""
    found: list[tuple[Any, Any]] = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        found += [(tree, key), *places(tree[key])]
    return found


def pruned(tree: Any, rng: random.Random) -> Any:
    """One to three of its parts become something else, go, or come twice."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not (there := places(tree)):
            return rng.choice(NASTY)
        container, key = rng.choice(there)
        way = rng.random()
        if way < 0.7:
            container[key] = copy.deepcopy(rng.choice(NASTY))
        elif way < 0.85:
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[str(rng.choice(NASTY))] = container[key]
    return tree


def deep(rng: random.Random) -> str:
    """JSON that nests."""
    depth = rng.choice((50, 200, 900, 3000, 100_000))
    left, right = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
    return left * depth + "1" + right * rng.choice((depth, depth, 0))


# Bytes.


def flipped(content: bytes, rng: random.Random) -> bytes:
    some, most = bytearray(content), min(len(content), rng.choice((16, 1500, 10**9)))
    for _ in range(rng.choice((1, 1, 2, 8))):
        some[rng.randrange(most)] ^= 1 << rng.randrange(8)
    return bytes(some)


def cut(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.7:
        return content[: rng.randrange(len(content))]
    return content + rng.randbytes(rng.choice((1, 8, 1000)))


def spliced(content: bytes, rng: random.Random) -> bytes:
    """A part is written over another, or left out, or replaced by noise."""
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    b = min(b, a + 2000)
    noise = rng.choice((b"", rng.randbytes(b - a), content[:50], b"\0" * (b - a), b"\xff" * (b - a)))
    return content[:a] + noise + content[b:]


# Prompt files: all take and return the bytes of a file.


def lying_length(content: bytes, rng: random.Random) -> bytes:
    header, body = parsed(content)
    true = len(dumped(header))
    sizes = (0, 1, 7, true - 1, true + 1, true + len(body), 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
    return joined(header, body, rng.choice(sizes))


def tensor_entry(content: bytes, rng: random.Random) -> bytes:
    header, body = parsed(content)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry, n = header[name], len(body)
    first, last = entry["data_offsets"]
    way = rng.randrange(6)
    if way == 0:
        own = entry["shape"]
        odd: list[Any] = [None, {}, [1.5], ["4"], [1, *own], own[::-1], [*own, 0], [0], [], [1] * 70]
        huge = [[2**63], [2**32, 2**32], [2**62, 4], [-1], [-4, -8], [10**18] * 3, [2**64], [0, 2**63]]
        entry["shape"] = rng.choice([*odd, *huge])
    elif way == 1:
        offsets = [
            [0, n + 1],
            [-1, last],
            [last, first],
            [first, last - 1],
            [first + 1, last],
            [0, 2**63],
            [2**64 - 2, 1],
        ]
        entry["data_offsets"] = rng.choice(
            [*offsets, [first], [], None, [first, last, last], ["0", "4"], [2**63, 2**63]]
        )
    elif way == 2:
        entry["dtype"] = rng.choice(DTYPES)
    elif way == 3:  # two tensors of one place
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif way == 4:
        length, *rest = entry["shape"] or [1]
        entry["shape"] = [rng.choice((length * 2**32, length + 1, 0, 2**61)), *rest]
    else:
        header = pruned(header, rng)
    return joined(header, body)


def retold(content: bytes, rng: random.Random) -> bytes:
    """A whole safetensors file with other tensors: shapes, numbers, types, names."""
    header, body = parsed(content)
    tensors: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind = {"F16": np.float16, "F32": np.float32}[entry["dtype"]]
            tensors[name] = np.frombuffer(body[slice(*entry["data_offsets"])], kind).reshape(entry["shape"]).copy()
    name = rng.choice(list(tensors))
    value, way = tensors[name], rng.randrange(6)
    if way == 0:
        value.reshape(-1)[rng.randrange(value.size)] = rng.choice((np.nan, np.inf, -np.inf, 65504, 1e-8))
    elif way == 1:
        extreme = rng.choice((3e38, 1e30, 1e10, 1e6, -1e6, 65504, 1e-45, 0))
        tensors[name] = np.full(value.shape, extreme, np.float32)
    elif way == 2:
        tensors[name] = value.astype(rng.choice((np.float64, np.int64, np.int8, np.bool_, np.complex64)))
    elif way == 3:
        axis = rng.randrange(value.ndim)
        rows = rng.choice((0, 1, value.shape[axis] - 1, value.shape[axis] + 1, 300))
        tensors[name] = np.resize(value, [rows if i == axis else n for i, n in enumerate(value.shape)])
    elif way == 4:
        tensors[name] = rng.choice((value.T, value[None], value[..., None], value.reshape(-1), value.reshape(-1)[0]))
    else:
        other = ["../../evil", "a/b", "a\0b", "a\nb" * 50, "x" * 100_000, "\x1b[2J", "__metadata__ ", "head.weight", ""]
        tensors[rng.choice([*other, "backbone.vit.x", "pool.keys", "head.bias", "calibration.scale"])] = value
        if rng.random() < 0.5:
            del tensors[name]
    names = {
        np.dtype(k): v
        for k, v in {"f2": "F16", "f4": "F32", "f8": "F64", "i8": "I64", "i1": "I8", "?": "BOOL", "c8": "C64"}.items()
    }
    fresh, parts, place = {"__metadata__": header["__metadata__"]}, [], 0
    for name, value in tensors.items():
        parts.append(np.ascontiguousarray(value).tobytes())
        offsets = [place, place := place + len(parts[-1])]
        fresh[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
    return joined(fresh, b"".join(parts))


def with_lpt(content: bytes, change: Callable[[Tree], Any]) -> bytes:
    """The same file with another lpt header: `change` returns a tree or a text."""
    header, body = parsed(content)
    found = change(json.loads(header["__metadata__"]["lpt"]))
    header["__metadata__"]["lpt"] = found if isinstance(found, str) else dumped(found)
    return joined(header, body)


def unsealed(content: bytes) -> bytes:
    """As somebody would leave it who wants other numbers believed: a file of format 1 is no other."""
    return with_lpt(content, lambda tree: {k: v for k, v in tree.items() if k != "sha256"} | {"format": 1})


def lpt_field(content: bytes, rng: random.Random) -> bytes:
    return with_lpt(content, lambda tree: pruned(tree, rng))


def huge_number(content: bytes, rng: random.Random) -> bytes:
    def change(tree: Tree) -> Tree:
        big: list[Any] = [10**18, 2**31, 2**63, 4096, 10**6, 1e308, 1e30, 5e-324, 1e-30, -1, 0]
        field = rng.choice(
            ("topk", "first", "neighbours", "scale", "temperature", "image", "counts", "classes", "deep")
        )
        if field == "image":
            tree["backbone"]["image_size"] = tree["preprocess"]["size"] = rng.choice(big)
        elif field == "counts":
            tree["counts"] = [rng.choice(big) for _ in tree["counts"]]
        elif field == "classes":  # a header may be large: what is made of its length must not be
            n = rng.choice((100_000, 1_000_000))
            tree |= {"classes": ["a"] * n, "counts": [1] * n}
        elif field == "deep":
            for part in ("inside", "fused"):
                tree[part] = {
                    k: rng.choice(big) if isinstance(v, int | float) else v for k, v in (tree[part] or {}).items()
                }
        else:
            tree[field] = rng.choice(big)
        return tree

    return with_lpt(content, change)


def deep_json(content: bytes, rng: random.Random) -> bytes:
    nested = deep(rng)
    way = rng.randrange(4)
    if way == 0:
        return joined(nested, parsed(content)[1])
    if way == 1:
        return with_lpt(content, lambda tree: nested)
    field = rng.choice(("settings", "data", "metrics", "later", "classes", "format", "method", "inside", "versions"))
    if way == 2:
        return with_lpt(content, lambda tree: dumped({**tree, field: NINES}).replace("9" * 5000, nested))
    header, body = parsed(content)
    return joined(dumped({**header, "x": NINES}).replace("9" * 5000, nested), body)


def doubled_keys(content: bytes, rng: random.Random) -> bytes:
    def twice(tree: Tree) -> str:
        key = rng.choice(list(tree))
        return dumped(tree)[:-1] + f", {json.dumps(key)}: {dumped(rng.choice([tree[key], *NASTY]))}}}"

    if rng.random() < 0.5:
        return with_lpt(content, twice)
    header, body = parsed(content)
    return joined(twice(header), body)


def harmless(content: bytes, rng: random.Random) -> bytes:
    """What says nothing of the model: a reader must not mind, and must see the same numbers."""
    header, body = parsed(content)
    if rng.random() < 0.3:
        header["__metadata__"][rng.choice(("other", "../../x", "é", "format"))] = "x" * rng.randrange(1000)
        return joined(header, body)

    def change(tree: Tree) -> Tree | str:
        del tree["sha256"]
        tree["format"] = 1
        way = rng.randrange(4)
        if way == 0:
            return tree | {rng.choice(("licence", "later", "__class__", "../x")): copy.deepcopy(rng.choice(NASTY[:17]))}
        if way == 1:
            return json.dumps(dict(sorted(tree.items(), key=lambda pair: rng.random())), indent=rng.choice((1, 4)))
        if way == 2:
            return tree | {"versions": {"lpt": "99"}, "method": "another"}
        return tree | {"settings": {"a": [1, {"b": None}]}, "data": {"name": "elsewhere"}}

    return with_lpt(content, change)


PROMPTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flips": flipped,
    "truncated or longer": cut,
    "spliced": spliced,
    "header length": lying_length,
    "tensor entries": tensor_entry,
    "other tensors": retold,
    "header fields": lpt_field,
    "huge numbers": huge_number,
    "deep JSON": deep_json,
    "doubled keys": doubled_keys,
    "harmless": harmless,
}


def safetensors(content: bytes, rng: random.Random) -> bytes:
    """Any other safetensors file with a JSON text in its metadata: checkpoints, prototypes."""
    way = rng.randrange(6)
    if way < 3:
        return (flipped, cut, spliced)[way](content, rng)
    if way == 3:
        return rng.choice((lying_length, tensor_entry))(content, rng)
    header, body = parsed(content)
    (key,) = header["__metadata__"]
    text = dumped(pruned(json.loads(header["__metadata__"][key]), rng)) if way == 4 else deep(rng)
    header["__metadata__"][rng.choice((key, key, key, "x"))] = text
    if rng.random() < 0.2:
        return joined(pruned(header, rng), body)
    return joined(header, body)


# Text.

YAML = (
    "!!python/object/apply:os.system ['id']",
    "!!python/name:os.system",
    "!!python/object/new:os.system ['id']",
    "!!binary x",
    "!!timestamp 2026-99-99",
    "2026-99-99",
    "!!int ''",
    "!!int x",
    "!!float ''",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "0x" + "f" * 20_000,
    "9" * 20_000,
    "1:" * 2000 + "1",
    "0b" + "1" * 20_000,
    "[" * 5000,
    "{a: " * 5000,
    "[" * 300 + "]" * 300,
    "- " * 3000,
    "{[a]: 1}",
    "{{a: 1}: 1}",
    "{? [a, b] : 1}",
    "*nowhere",
    "&a [*a]",
    "&a {a: *a}",
    "<<: [1, 2]",
    "{<<: 1}",
    ".inf",
    ".nan",
    "~",
    "\t",
    "%YAML 9.9\n---\n",
    "---\na\n---\nb",
    "'",
    '"\\ud800"',
    '"\\0"',
    "|\n  " + "x" * 100_000,
    "{}",
    "[]",
)
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def yaml_text(content: bytes, rng: random.Random) -> bytes:
    way = rng.randrange(7)
    if way == 0:
        return (flipped, cut, spliced)[rng.randrange(3)](content, rng)
    lines = content.decode().splitlines()
    where = rng.randrange(len(lines))
    if way == 1:
        lines[where] = lines[where].partition(":")[0] + ": " + rng.choice(YAML)
    elif way == 2:
        lines[where] = lines[where].partition(":")[0] + ": " + dumped(rng.choice(NASTY))
    elif way == 3:
        lines.insert(where, rng.choice((rng.choice(YAML), lines[-where - 1], "  " * rng.randrange(5) + "later: 1")))
    elif way == 4:
        return (BOMB + content.decode() + rng.choice(("", "later: *a11", "  seed: *a11\n", "  name: *a9\n"))).encode()
    elif way == 5:
        return rng.choice(
            (
                rng.choice(YAML).encode(),
                b"\xff\xfe" + content,
                content + b"\xff",
                content.decode().encode("utf-16"),
                b"\0" * 99,
                b"",
            )
        )
    else:
        import yaml

        text = dumped(pruned(yaml.safe_load(content), rng))
        return text.encode("utf-8", "surrogatepass")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def list_text(content: bytes, rng: random.Random) -> bytes:
    way = rng.randrange(4)
    if way == 0:
        return (flipped, cut, spliced)[rng.randrange(3)](content, rng)
    lines = content.decode().splitlines()
    where = rng.randrange(len(lines))
    label = rng.choice(
        ("-1", "-2", "999999999", "9" * 30, "1e3", "0x1", "٣", "", "1.0", " 1", "nan", "100", "²", "+1", "00")
    )
    path = rng.choice(
        ("../../../etc/passwd", "/etc/passwd", "\0", "a" * 5000, "a\x1b[2J", "", " ", "é" * 300, "a/" * 3000, "~")
    )
    if way == 1:
        lines[where] = f"{lines[where].rpartition(' ')[0]} {label}"
    elif way == 2:
        lines[where] = f"{path} {rng.choice((label, '0', '1'))}"
    else:
        extra = rng.choice((path, label, "\u2028", "\x0c", "\ufeff" + lines[0], lines[0] * 1000, "x " * 50_000))
        lines.insert(where, extra)
    return "\n".join(lines).encode()


# Tables of images.


def table_files(rng: random.Random) -> dict[str, bytes]:
    """A folder of twelve images, and what says of which class they are, damaged: CSV, JSON lines or parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    small = image_files()[0][1]
    names, classes = [f"{i}.jpg" for i in range(12)], ["ant", "bee", "cat"] * 4
    kind = rng.choice(("csv", "jsonl", "parquet"))
    if kind == "parquet":
        columns = {"image": [{"bytes": small, "path": name} for name in names], "label": classes}
        if rng.random() < 0.5:
            columns[rng.choice(("image", "label"))] = [rng.choice([None, "x", "\x1b[2J", "é" * 99]) for _ in names]
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        content = buffer.getvalue()
        if rng.random() < 0.6:
            content = rng.choice((flipped, cut, spliced))(content, rng)
        pointer = b"---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"
        return {"train.parquet": content, **({"README.md": pointer} if rng.random() < 0.3 else {})}
    rows = [{"file_name": name, "label": of} for name, of in zip(names, classes, strict=True)]
    if kind == "jsonl":
        text = "\n".join(dumped(pruned(row, rng) if rng.random() < 0.2 else row) for row in rows)
        text = rng.choice((text, deep(rng), text + "\n" + deep(rng)))
    else:
        text = "file_name,label\n" + "\n".join(f"{row['file_name']},{row['label']}" for row in rows)
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.6:
        content = (list_text if kind == "csv" else flipped)(content, rng)
    return {f"metadata.{kind}": content, **dict.fromkeys(names, small)}


# Images.


def image_files() -> list[tuple[str, bytes]]:
    """A small image in every format, some of them large by what they say of themselves."""
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8))
    found = []
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        for mode in ("RGB", "L", "P", "CMYK", "I;16", "F", "RGBA", "1"):
            buffer = io.BytesIO()
            try:
                pixels.convert("L" if mode in ("I;16", "F") else "RGB").convert(mode).save(buffer, kind)
            except (OSError, ValueError, KeyError):
                continue
            found.append((f"{kind} {mode}", buffer.getvalue()))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        pixels.save(buffer, kind, exif=exif)
        found.append((f"{kind} turned", buffer.getvalue()))
    return found


def bombs() -> list[tuple[str, bytes]]:
    """Small files of huge images: those in between are decoded, the largest must not be."""
    from PIL import Image

    found = []
    for side, kind, mode in (
        *((8000, "PNG", "1"), (8000, "PNG", "L"), (8000, "PNG", "I;16"), (8100, "PNG", "RGBA"), (8192, "GIF", "P")),
        *((9000, "TIFF", "1"), (13_300, "PNG", "1"), (16_000, "PNG", "1"), (9000, "JPEG", "L")),
    ):
        buffer = io.BytesIO()
        Image.new(mode, (side, side)).save(buffer, kind, **({"compression": "group4"} if kind == "TIFF" else {}))
        found.append((f"{kind} {mode} of {side}", buffer.getvalue()))
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)
    found.append(("PNG of 2**62", header + b"\0" * 40))
    found.append(
        ("BMP of 2**60", b"BM" + b"\0" * 12 + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0))
    )
    found.append(("PPM of 10**18", b"P6 1000000000 1000000000 255\n" + b"\0" * 99))
    found.append(
        ("GIF of 65535", b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;")
    )
    found.append(
        ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) (w) file\n")
    )
    return found


def image(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((flipped, flipped, cut, spliced))(content, rng)
