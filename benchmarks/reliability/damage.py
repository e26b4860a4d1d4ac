"""Ways to damage a file: bytes, JSON, safetensors, text, tables, images; hypothesis draws what exactly.

A way is a function of (content, choose) and returns content; what is in it may be anything at all.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

Tree = dict[str, Any]


class Choose:
    """Draws from hypothesis, and remembers in words what it drew."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]):
        self._draw = draw
        self.words: list[str] = []

    def __call__(self, strategy: st.SearchStrategy[Any]) -> Any:
        value = self._draw(strategy)
        self.words.append(repr(value)[:60])
        return copy.deepcopy(value)

    def one(self, values: Iterable[Any]) -> Any:
        return self(st.sampled_from(list(values)))

    def number(self, low: int, high: int) -> int:
        return self(st.integers(low, high))

    def slot(self, pairs: list[tuple[Any, Any]]) -> tuple[Any, Any]:
        """One of these (container, key), not a copy."""
        return pairs[self.number(0, len(pairs) - 1)]

    def rarely(self, one_in: int) -> bool:
        return self.number(0, one_in - 1) == one_in - 1


# JSON.

MARK = "mark" * 8
"""Stands for what no tree can hold: a number of 5000 digits, which Python refuses to print, or what is too deep."""
BIG = [0, 1, -1, 64, 4096, 10**6, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, -(10**18), 10**300]
BIG += [1e30, 1e-30, 1e308, -1e308, 5e-324]
WORDS = ["", " ", "x" * 10_000, "../../../etc/passwd", "/etc/passwd", "\0", "a\0b", "a\nb", "\x1b[2J", "\ud800", "1"]
WORDS += ["NaN", "__class__", "{}", "timm:hf_hub:a/b", "F32", "os.system('id')", "!!python/name:os.system", MARK]
LISTS = [["a"] * 1000, [10**18] * 4, [0] * 4, [1, 2, 3], [-5, 25, 14, 15], ["a", "b"], {"": {}}, {"__proto__": 1}]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.sampled_from(BIG) | st.sampled_from(WORDS) | st.sampled_from(LISTS)
JSON |= st.recursive(
    SCALARS | JSON,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=9), inside, max_size=3),
    max_leaves=6,
)
DEEP = st.builds(
    lambda depth, brackets, closed: brackets[0] * depth + "1" + brackets[1] * depth * closed,
    st.sampled_from([50, 200, 900, 3000, 100_000]),
    st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")]),
    st.sampled_from([1, 1, 0]),
)


def dumped(tree: Any, mark: str = "9" * 5000) -> str:
    return json.dumps(tree).replace(f'"{MARK}"', mark)


def slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from slots(value)


def edited(tree: Any, choose: Choose) -> Any:
    """One to three parts of a tree become something else, go, or come twice."""
    tree = copy.deepcopy(tree)
    for _ in range(choose.number(1, 3)):
        pairs = list(slots(tree))
        if not pairs:
            return choose(JSON)
        container, key = choose.slot(pairs)
        way = choose.one(["another", "another", "another", "gone", "twice"])
        if way == "another":
            container[key] = choose(JSON)
        elif way == "gone":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[choose(st.sampled_from(WORDS) | st.text(max_size=9))] = copy.deepcopy(container[key])
    return tree


def json_text(tree: Any, choose: Choose) -> str:
    """A tree as text: edited, with a key twice, with something in it that nests too deep, or nothing but that."""
    way = choose.one(["edited", "edited", "key twice", "deep part", "deep"])
    if way == "deep":
        return choose(DEEP)
    if way == "deep part":
        tree = copy.deepcopy(tree)
        container, key = choose.slot([*slots(tree), *([(tree, "later")] if isinstance(tree, dict) else [])])
        container[key] = MARK
        return dumped(tree, choose(DEEP))
    if way == "key twice" and tree and isinstance(tree, dict):
        key = choose.one(tree)
        return f"{dumped(tree)[:-1]}, {json.dumps(key)}: {dumped(choose(st.just(tree[key]) | JSON))}}}"
    return dumped(edited(tree, choose))


# Bytes.


def damaged_bytes(content: bytes, choose: Choose) -> bytes:
    """Bits flip, the end is missing, something follows, or a part is left out or overwritten."""
    way = choose.one(["bits", "cut", "longer", "part"])
    if way == "bits":
        changed, reach = bytearray(content), min(len(content), choose.one([16, 1500, 10**9]))
        for _ in range(choose.one([1, 1, 2, 8])):
            changed[choose.number(0, reach - 1)] ^= 1 << choose.number(0, 7)
        return bytes(changed)
    first = choose.number(0, len(content) - 1)
    if way == "cut":
        return content[:first]
    noise = choose(st.binary(min_size=1, max_size=16)) * choose.one([1, 60])
    if way == "longer":
        return content + noise
    width = min(choose.number(0, 2000), len(content) - first)
    filler = choose.one([b"", content[:50], b"\0" * width, b"\xff" * width, (noise * width)[:width]])
    return content[:first] + filler + content[first + width :]


# Safetensors files with one JSON text in their metadata.

DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "U64", "x", "f16"]
TYPES = ["f2", "f4", "f8", "i8", "i1", "u1", "?", "c8"]
ARRAYS = st.sampled_from(TYPES).flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=9, max_side=3)))
NAMES = ["../../evil", "a/b", "a\0b", "a\nb" * 50, "x" * 100_000, "\x1b[2J", "__metadata__ ", "", "head.weight"]
NAMES += ["backbone.vit.x", "pool.keys", "head.bias", "calibration.scale"]


def parsed(content: bytes) -> tuple[Tree, bytes]:
    """(header, body)."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Tree | str, body: bytes, size: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else dumped(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def with_json(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """The same file with another text in its metadata: `change` returns a tree or the text itself."""
    header, body = parsed(content)
    (key,) = header["__metadata__"]
    fresh = change(json.loads(header["__metadata__"][key]))
    header["__metadata__"][key] = fresh if isinstance(fresh, str) else dumped(fresh)
    return joined(header, body)


def metadata(content: bytes, choose: Choose) -> bytes:
    return with_json(content, lambda tree: json_text(tree, choose))


def header(content: bytes, choose: Choose) -> bytes:
    tree, body = parsed(content)
    return joined(json_text(tree, choose), body)


def header_length(content: bytes, choose: Choose) -> bytes:
    tree, body = parsed(content)
    size = len(dumped(tree))
    lies = [0, 1, 7, size - 1, size + 1, size + len(body), 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    return joined(tree, body, choose.one(lies))


def tensor_entry(content: bytes, choose: Choose) -> bytes:
    """A tensor lies about its shape, its place or its type."""
    tree, body = parsed(content)
    entries = [tree[name] for name in tree if name != "__metadata__"]
    entry = entries[choose.number(0, len(entries) - 1)]
    own, near = entry["shape"], [0, len(body), *entry["data_offsets"]]
    sizes = st.sampled_from([*BIG, *own, *(n * 2**32 for n in own), 2**61]) | st.integers(-8, 300)
    odd = [[1, *own], own[::-1], [*own, 0], [], [0], [1] * 70, [2**32, 2**32], [2**62, 4], [10**18] * 3, [0, 2**63]]
    ends = st.sampled_from([*BIG, *near, *(n + 1 for n in near), *(n - 1 for n in near), 2**64 - 2])
    other = st.sampled_from([entry["data_offsets"] for entry in entries])  # two tensors in one place
    lies = {
        "shape": st.sampled_from(odd) | st.lists(sizes, max_size=5) | sizes.map(lambda n: [n, *own[1:]]) | JSON,
        "data_offsets": st.lists(ends, min_size=2, max_size=2) | st.lists(ends, max_size=3) | other | JSON,
        "dtype": st.sampled_from([*DTYPES, ""]),
    }
    key = choose.one(lies)
    entry[key] = choose(lies[key])
    return joined(tree, body)


def another_tensor(content: bytes, choose: Choose) -> bytes:
    """A sound file in which one tensor has other numbers, another type, shape or name."""
    from safetensors.numpy import load, save

    tensors = load(content)
    name = choose.one(sorted(tensors))
    value = np.atleast_1d(tensors[name])
    way = choose.one(["number", "numbers", "type", "rows", "axes", "any", "name"])
    if way == "number":
        value = value.astype(value.dtype if value.dtype.kind == "f" else np.float32)
        value.flat[choose.number(0, value.size - 1)] = choose.one([np.nan, np.inf, -np.inf, 65504, 1e-8])
    elif way == "numbers":
        value = np.full(value.shape, choose.one([3e38, 1e30, 1e10, 1e6, -1e6, 65504, 1e-45, 0]), np.float32)
    elif way == "type":
        value = value.astype(choose.one(TYPES))
    elif way == "rows":
        axis = choose.number(0, value.ndim - 1)
        rows = choose.one([0, 1, value.shape[axis] - 1, value.shape[axis] + 1, 300])
        value = np.resize(value, [*value.shape[:axis], rows, *value.shape[axis + 1 :]])
    elif way == "axes":
        value = choose.one([value.T, value[None], value[..., None], value.reshape(-1), value.reshape(-1)[0]])
    elif way == "any":
        value = choose(ARRAYS)
    else:
        if choose.rarely(2):
            del tensors[name]
        name = choose.one(NAMES)
    return save(tensors | {name: np.array(value, order="C")}, parsed(content)[0]["__metadata__"])


SAFETENSORS: dict[str, Callable[[bytes, Choose], bytes]] = {
    way.__name__: way for way in (damaged_bytes, header, header_length, metadata, tensor_entry, another_tensor)
}


# Prompt files: safetensors with a seal, and more to lie about.


def unsealed(content: bytes) -> bytes:
    """As somebody would leave it who wants other numbers believed: a file of format 1 has no seal."""
    return with_json(content, lambda tree: {k: v for k, v in tree.items() if k != "sha256"} | {"format": 1})


def sealed_anew(content: bytes) -> bytes:
    """The same with a right seal, where it can still be read: by somebody who knows this package."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from lpt.files import seal

    def stamped(tree: Any) -> Tree:
        bare = {key: value for key, value in tree.items() if key != "sha256"}
        return bare | {"sha256": seal(bare, load(content))}

    broken = (SafetensorError, struct.error, ValueError, LookupError, AttributeError, TypeError, RecursionError)
    with contextlib.suppress(*broken):
        return with_json(content, stamped)
    return content


def huge_number(content: bytes, choose: Choose) -> bytes:
    """Numbers of which a reader makes something: none may make it large or slow."""

    def change(tree: Tree) -> Tree:
        field = choose.one(["any", "any", "image", "counts", "classes"])
        if field == "image":
            tree["backbone"]["image_size"] = tree["preprocess"]["size"] = choose.one(BIG)
        elif field == "counts":
            tree["counts"] = [choose.one(BIG) for _ in tree["counts"]]
        elif field == "classes":  # a header may be large: what is made of its length must not be
            number = choose.one([100_000, 1_000_000])
            tree |= {"classes": ["a"] * number, "counts": [1] * number}
        else:
            numbers = [(box, key) for box, key in slots(tree) if isinstance(box[key], int | float)]
            container, key = choose.slot([pair for pair in numbers if pair[0] is not tree["counts"]])
            container[key] = choose.one(BIG)
        return tree

    return with_json(content, change)


def is_json(value: Any) -> bool:
    """Not NaN and infinity, which are refused wherever they stand."""
    return not isinstance(value, float) or math.isfinite(value)


def harmless(content: bytes, choose: Choose) -> bytes:
    """What says nothing of the model: a reader must not mind, and must see the same numbers."""

    def change(tree: Tree) -> Tree | str:
        way = choose.one(["more", "order", "versions", "settings"])
        if way == "more":
            return tree | {choose.one(["licence", "later", "__class__", "../x"]): choose(SCALARS.filter(is_json))}
        if way == "order":
            return json.dumps(dict(choose(st.permutations(list(tree.items())))), indent=choose.one([1, 4]))
        if way == "versions":
            return tree | {"versions": {"lpt": "99"}, "method": "another"}
        return tree | {"settings": {"a": [1, {"b": None}]}, "data": {"name": "elsewhere"}}

    if not choose.rarely(4):
        return with_json(unsealed(content), change)
    tree, body = parsed(content)
    tree["__metadata__"][choose.one(["other", "../../x", "é", "format"])] = "x" * choose.number(0, 1000)
    return joined(tree, body)


def odd_pixels(content: bytes, choose: Choose) -> bytes:
    """Other means, deviations and sizes of pixels, whole or one number of them."""

    def change(tree: Tree) -> Tree:
        pixels = tree["preprocess"]
        key = choose.one(["mean", "std", "mean", "std", "crop_ratio", "min_area", "size"])
        value = choose.one([float("nan"), float("inf"), 1e30, 1e-45, 1e3, 1e-3, 10.0, -10.0, 0, True, None, 1e999, -1])
        if key == "size":
            tree["backbone"]["image_size"] = pixels["size"] = choose.one([16, 48, 256, 1024, 33])
        elif key in ("mean", "std"):
            pixels[key][choose.number(0, 2)] = value
            pixels[key] = choose.one([pixels[key], pixels[key], [value] * 3, [value]])
        else:
            pixels[key] = value
        return tree

    return with_json(content, change)


def extreme_tensors(content: bytes, choose: Choose) -> bytes:
    """Every tensor, or some, at the largest numbers that are read, and the header's numbers with them."""
    from safetensors.numpy import load, save

    tensors = load(content)
    size = choose.one([1e6, 999_424, 65_504, 1e-6, 1e-38, 0])  # 999,424 is below 1e6 in fp16's steps, if it had them
    for name, value in tensors.items():
        if not choose.rarely(4):
            signs = np.where(np.arange(value.size) % choose.one([2, 3, 10**9]) == 0, 1, -1).reshape(value.shape)
            tensors[name] = (size * signs).astype(np.float32)
    header, _ = parsed(content)
    fresh = save(tensors, metadata=header["__metadata__"])

    def change(tree: Tree) -> Tree:
        for key in ("scale", "temperature"):
            if key in tree and choose.rarely(2):
                tree[key] = choose.one([1e6, 1e-6, 1.0])
        return tree

    return with_json(fresh, change)


def long_words(content: bytes, choose: Choose) -> bytes:
    """Words of a header that are printed, long or many."""

    def change(tree: Tree) -> Tree:
        word = choose.one(["x", "\x1b[2J", "é", "\n", "a b "]) * choose.one([1, 300, 50_000])
        key = choose.one(["method", "classes", "settings", "data", "versions", "metrics", "backbone"])
        many = {f"{word}{i}"[:60_000]: choose.one([1e300, 0.5, None]) for i in range(choose.one([1, 90, 2000]))}
        if key == "method":
            tree[key] = word
        elif key == "classes":
            tree[key][choose.number(0, len(tree[key]) - 1)] = word
        elif key == "backbone":
            tree[key]["name"] = word
        elif key == "versions":
            tree[key] = {name[:20_000]: word[:20_000] for name in list(many)[:40]}
        elif key == "metrics":
            tree[key] = many
        else:
            tree[key] = choose.one([{"name": word}, many, {"a": [many]}])
        return tree

    return with_json(content, change)


PROMPTS = SAFETENSORS | {"huge_number": huge_number, "harmless": harmless}
STRUCTURED = {way: SAFETENSORS[way] for way in ("metadata", "tensor_entry", "another_tensor")}
STRUCTURED |= {"huge_number": huge_number, "harmless": harmless, "odd_pixels": odd_pixels}
STRUCTURED |= {"extreme_tensors": extreme_tensors, "long_words": long_words}
"""Ways that know what a prompt file is made of: sealed anew, many of them get far."""

# Text.

YAML = """!!python/object/apply:os.system ['id'] ¦ !!python/name:os.system ¦ !!python/object/new:os.system ['id'] ¦ ~
¦ !!binary x ¦ !!timestamp 2026-99-99 ¦ 2026-99-99 ¦ !!int '' ¦ !!int x ¦ !!float '' ¦ !!set {a, b} ¦ !!omap [a: 1]
¦ {[a]: 1} ¦ {{a: 1}: 1} ¦ {? [a, b] : 1} ¦ *nowhere ¦ &a [*a] ¦ &a {a: *a} ¦ <<: [1, 2] ¦ {<<: 1} ¦ .inf ¦ .nan
¦ %YAML 9.9\n---\n ¦ ---\na\n---\nb ¦ ' ¦ "\\ud800" ¦ "\\0" ¦ &a ¦ *a ¦ ? ¦ : ¦ , ¦ [ ¦ ] ¦ { ¦ } ¦ > ¦ - ¦ [] ¦ {}"""
LONG = ["0x" + "f" * 20_000, "9" * 20_000, "1:" * 2000 + "1", "0b" + "1" * 20_000, "|\n  " + "x" * 100_000, "\t"]
LONG += ["[" * 5000, "{a: " * 5000, "[" * 300 + "]" * 300, "- " * 3000, "*a9", "*a11", "\n  later: 1", "\nlater: *a11"]
TOKENS = st.sampled_from(YAML.split("¦")).map(lambda token: token.strip(" "))
YAML_TEXT = TOKENS | st.lists(TOKENS, min_size=2, max_size=5).map(" ".join) | st.sampled_from(LONG)
YAML_TEXT |= JSON.map(dumped) | st.text()
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
LABELS = ["-1", "-2", "999999999", "9" * 30, "1e3", "0x1", "٣", "", "1.0", " 1", "nan", "100", "²", "+1", "00", "1"]
PATHS = ["../../../etc/passwd", "/etc/passwd", "\0", "a" * 5000, "a\x1b[2J", "", " ", "é" * 300, "a/" * 3000, "~"]
LIST_TEXT = st.sampled_from([*LABELS, *PATHS, "\u2028", "\x0c", "x " * 50_000, "a/0 of a.png 0" * 1000]) | st.text()
LIST_TEXT |= st.tuples(st.sampled_from(PATHS), st.sampled_from(LABELS)).map(" ".join)


def damaged_text(content: bytes, choose: Choose, values: st.SearchStrategy[str], between: str) -> bytes:
    """A line's value, behind `between`, becomes another, a line comes in between, or all becomes something else."""
    way = choose.one(["bytes", "value", "value", "line", "line", "all", "encoding"])
    if way == "bytes":
        return damaged_bytes(content, choose)
    if way == "encoding":
        marked = [b"\xff\xfe" + content, content + b"\xff", b"\xef\xbb\xbf" + content, b"\0" * 99, b""]
        return choose.one([*marked, content.decode().encode("utf-16")])
    lines = content.decode().splitlines()
    where = choose.number(0, len(lines) - 1)
    if way == "value":
        lines[where] = lines[where].rpartition(between)[0] + between + choose(values)
    elif way == "line":
        lines.insert(where, choose(values | st.sampled_from(lines)))
    else:
        lines = [choose(values)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def damaged_yaml(content: bytes, choose: Choose) -> bytes:
    import yaml

    way = choose.one(["text", "text", "text", "bomb", "tree"])
    if way == "tree":
        return json_text(yaml.safe_load(content), choose).encode("utf-8", "surrogatepass")
    content = BOMB.encode() + content if way == "bomb" else content
    return damaged_text(content, choose, YAML_TEXT, ": ")


def damaged_list(content: bytes, choose: Choose) -> bytes:
    return damaged_text(content, choose, LIST_TEXT, " ")


# Tables of images.


def table_files(choose: Choose) -> dict[str, bytes]:
    """A folder of twelve images, and what says of which class they are, damaged: CSV, JSON lines or parquet."""
    small = image_files()["JPEG RGB"]
    names, classes = [f"{i}.jpg" for i in range(12)], ["ant", "bee", "cat"] * 4
    kind = choose.one(["csv", "jsonl", "parquet"])
    if kind == "parquet":
        files = {"train.parquet": _parquet(small, names, classes, choose)}
        pointer = b"---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"
        return files | ({"README.md": pointer} if choose.rarely(3) else {})
    pairs = list(zip(names, classes, strict=True))
    if kind == "csv":
        content = "\n".join(["file_name,label", *map(",".join, pairs)]).encode()
        content = damaged_text(content, choose, LIST_TEXT, ",")
    else:
        rows = [{"file_name": name, "label": label} for name, label in pairs]
        rows = edited(rows, choose) if choose.rarely(2) else rows
        content = "\n".join(map(dumped, rows if isinstance(rows, list) else [rows])).encode("utf-8", "surrogatepass")
        content = damaged_text(content, choose, JSON.map(dumped) | DEEP, ": ") if choose.rarely(2) else content
    return {f"metadata.{kind}": content, **dict.fromkeys(names, small)}


def _parquet(small: bytes, names: list[str], classes: list[str], choose: Choose) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"image": [{"bytes": small, "path": name} for name in names], "label": classes}
    if choose.rarely(2):
        cells = st.sampled_from([None, "x", "\x1b[2J", "é" * 99]) | st.text()
        columns[choose.one(columns)] = choose(st.lists(cells, min_size=12, max_size=12))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return damaged_bytes(buffer.getvalue(), choose) if choose.rarely(2) else buffer.getvalue()


# Images.


def image_files() -> dict[str, bytes]:
    """A small image in every format and mode, and turned by its EXIF."""
    from PIL import Image

    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))
    turned, files = Image.Exif(), {}
    turned[0x0112] = 6
    modes = ("RGB", "L", "P", "CMYK", "I;16", "F", "RGBA", "1", "turned")
    for kind, mode in itertools.product(("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"), modes):
        buffer, source = io.BytesIO(), pixels.convert("L") if mode in ("I;16", "F") else pixels
        with contextlib.suppress(OSError, ValueError, KeyError):  # not every format has every mode
            if mode == "turned":
                source.save(buffer, kind, exif=turned)
            else:
                source.convert(mode).save(buffer, kind)
            files[f"{kind} {mode}"] = buffer.getvalue()
    return files


def bombs() -> dict[str, bytes]:
    """Small files of huge images: the JPEG is decoded small, the others must not be decoded."""
    from PIL import Image

    sides = {"PNG 1": 8000, "PNG L": 8000, "PNG I;16": 8000, "PNG RGBA": 8100, "GIF P": 8192, "TIFF 1": 9000}
    sides |= {"PNG 1 wide": 13_300, "PNG 1 wider": 16_000, "JPEG L": 9000}
    files = {}
    for name, side in sides.items():
        kind, mode, *_ = name.split()
        buffer = io.BytesIO()
        Image.new(mode, (side, side)).save(buffer, kind, **({"compression": "group4"} if kind == "TIFF" else {}))
        files[f"{name} of {side}"] = buffer.getvalue()
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)
    bmp = b"BM" + b"\0" * 12 + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    gif = b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) (w) file\n"
    files |= {"PNG of 2**62": png + b"\0" * 40, "BMP of 2**60": bmp, "GIF of 65535": gif, "PostScript": script}
    return files | {"PPM of 10**18": b"P6 1000000000 1000000000 255\n" + b"\0" * 99}
