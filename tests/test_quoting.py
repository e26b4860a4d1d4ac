"""Classes, files and folders may be called anything: nothing of it moves a cursor, begins a line or is computed."""

import csv
import io
import json
import re

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lpt.data.task import Files
from lpt.errors import printable
from lpt.report.markdown import table
from lpt.report.pseudo_labels import read_last_round, write_round
from lpt.report.quoting import code_block, for_html, for_markdown, for_spreadsheet, shell_command
from tests.support.command_line import lpt as command

CLASSES = (
    "red\x1b[31m\x1b[2J",
    "line\n# Forged | 99.9 |",
    "<img src=x onerror=alert(1)>",
    "=HYPERLINK(1)",
    "[a](b) `c` *d* | e",
)


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A folder of photos with such names, and a run on it."""
    root = tmp_path_factory.mktemp("s") / "photos\x1b[5m\nerror: forged"
    for k, name in enumerate(CLASSES):
        for i in range(4):
            file = root / name.replace("/", "_") / f"{i}\x1b[1A\n.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (50 * k, 20 * i, 9)).save(file, "PNG")
    return root


def said_plainly(said: str, begins: tuple[str, ...]) -> None:
    """Every line is printable and begins as one of ours."""
    for line in said.splitlines():
        assert line.isprintable(), repr(line)
        assert line.startswith(begins), repr(line)


def test_every_command_says_names_plainly(strange, tmp_path, capsys):
    code, said, err = command(capsys, "doctor", strange)
    assert (code, err) == (0, "")
    said_plainly(said, ("5 classes", "imbalance", "groups", "shorter", "note: ", "problem: ", "nothing stands"))
    words = ["backbone.name=nano", "method.name=class_mean", "train.batch_size=4"]
    code, said, err = command(capsys, "fit", strange, *words, "--out", tmp_path / "run")
    assert code == 0, err
    said_plainly(said.partition("\nphotos?")[2], ("",))
    assert "\x1b" not in said and "\nerror: forged" not in said and "\n# Forged" not in said
    prompt = tmp_path / "run" / "prompt.safetensors"
    code, said, err = command(capsys, "evaluate", prompt, f"data.root={json.dumps(str(strange))}")
    assert code == 0, err
    said_plainly(said, ("folder (", "warning: ", "|"))
    (strange / "broken\x1b[2J.png").write_bytes(b"none")
    code, said, err = command(capsys, "predict", prompt, strange)
    assert code == 1
    said_plainly(said, (str(strange).partition("photos")[0],))
    said_plainly(err, ("error: ",))
    assert len(said.splitlines()) == 20 and len(err.splitlines()) == 1
    code, _, err = command(capsys, "doctor", strange / "absent\x1b[2J\nerror: forged")
    assert code == 2 and len(err.splitlines()) == 1 and err[:-1].isprintable()
    (strange / "broken\x1b[2J.png").unlink()


def test_reports_say_names_plainly(strange, tmp_path, capsys):
    words = ["backbone.name=nano", "method.name=class_mean", "train.batch_size=4"]
    out = tmp_path / "run ``` \x1b[2J"
    assert command(capsys, "fit", strange, *words, "--out", out)[0] == 0
    text = (out / "report.md").read_text()
    assert all(line.isprintable() for line in text.splitlines())
    assert [line for line in text.splitlines() if line.startswith("#")] == text.splitlines()[:1]
    assert "<img" not in text and "&lt;img src=x" in text and r"\[a\](b) \`c\` \*d\* \| e" in text
    assert text.count("\n````") == 2 and "$'" in text  # the command, with a longer fence and on one line
    page = (out / "report.html").read_text()
    assert "<img src=x" not in page and "\x1b" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("maple_tree, No. 5 (wild) – ü", "maple_tree, No. 5 (wild) – ü"),
        ("_emphasis_ **strong**", r"\_emphasis\_ \*\*strong\*\*"),
        ("# heading", r"\# heading"),
        ("a|b", r"a\|b"),
        ("https://x.org www.x.org a@x.org", r"https:\//x.org www\.x.org a\@x.org"),
        ("<b>&amp;</b>", "&lt;b&gt;&amp;amp;&lt;/b&gt;"),
        ("two\nlines\r\u2028", "two?lines??"),
        ("$x^2$ \\n", r"\$x^2\$ \\n"),
    ],
)
def test_markdown_says_the_name_itself(name, written):
    assert for_markdown(name) == written


def test_tables_have_one_line_a_row():
    rows = table([("a|b\n|c", {"accuracy": 0.5}), ("<b>", {})]).splitlines()
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}


def test_code_html_and_commands():
    assert code_block("a ``` b ````` c")[0] == "``````sh"
    assert for_html('"<&\x1b\n') == "&quot;&lt;&amp;??"
    assert shell_command("a'b\n", "x y") == r"$'a\'b\n' 'x y'" and shell_command("\udcff") == r"$'\xff'"
    assert printable("plain ü") == "plain ü" and printable("\x1b\x07\u202e\t\udce9") == "????\\xe9"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1", "'quoted"])
def test_cells_are_no_formulas(name, tmp_path):
    assert for_spreadsheet(name) == "'" + name
    classes, path = ("cat", name, for_spreadsheet(name)), tmp_path / "p.parquet"
    noted = {
        "rows": torch.arange(4),
        "step": torch.zeros(4, dtype=torch.long),
        "label": torch.tensor([0, 1, 2, 1]),
        "confidence": torch.rand(4),
        "kept": torch.ones(4, dtype=torch.bool),
    }
    truth = torch.tensor([1, 2, 0, -1])
    write_round(path, noted, number=1, ids=[name, "b", "c", "\udcff"], truth=truth, classes=classes)
    cells = pq.read_table(path).to_pydict()
    assert cells["image"] == ["'" + name, "b", "c", "\\udcff"] and cells["label"][0] == "cat"
    assert not [c for c in cells["label"] + cells["image"] if c.lstrip().startswith(("=", "+", "-", "@", "＝"))]
    back, number = read_last_round(path, classes)
    assert number == 1 and torch.equal(back["label"], noted["label"]) and torch.equal(back["truth"], truth)


def test_the_table_of_a_suite_is_no_formula_either(tmp_path):
    from lpt.report.over_seeds import write

    row = {"method": "=1+1", "seed": 0, "accuracy": -0.5, "commit": "+a", "prompt_bytes": 1, "seconds": 1.0}
    row |= {"trainable_parameters": 3, "versions": {}, "processor": "x"}
    row |= {key: 0.5 for key in ("class_accuracy", "many", "medium", "few", "worst_class", "ece")}
    write(tmp_path / "s.json", "s", {"=1+1": []}, [row])
    cells = next(csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text())))
    assert cells["method"] == "'=1+1" and cells["commit"] == "'+a" and cells["accuracy"] == "-0.5"


def test_warnings_of_a_task_are_one_line_each(strange):
    import lpt

    task = lpt.load_task("folder", root=strange)
    assert sorted(task.classes) == sorted(CLASSES) and isinstance(task.train, Files)
    lines = lpt.Task("a\nb", task.classes, task.train, task.test, facts={"skipped": ["x\n\x1b"]}).summary_lines()
    assert len(lines) == 2 and all(line.isprintable() for line in lines)
