"""A finished run is read from its folder: others beside it, pictures or none, files that are not what they were."""

import json
import shutil

import pytest

from lpt.errors import LptError
from lpt.report.finished import write_page
from lpt.run import report_again


def test_another_run_stands_beside_it(finished, tmp_path):
    copy, other = tmp_path / "mine", tmp_path / "the other"
    shutil.copytree(finished, copy)
    shutil.copytree(finished, other)
    page = copy / "report.html"
    rows = report_again(copy, against=[other])
    assert list(rows) == ["the other", "mine"] and rows["mine"] == json.loads((copy / "report.json").read_text())
    assert page.read_text().count("the other") >= 4  # one bar for each group, a line
    shutil.copytree(finished, tmp_path / "x" / "the other")
    assert len(report_again(copy, against=[other, tmp_path / "x" / "the other"])) == 3
    named = page.read_text()
    assert f"{tmp_path.name}/the other"[-31:] in named and "x/the other" in named  # two runs of one name stay two
    with pytest.raises(LptError, match="4 runs are too many"):
        report_again(copy, against=[other] * 4)
    split = json.loads((other / "split.json").read_text())
    (other / "split.json").write_text(json.dumps(split | {"classes": ["a", "b"]}))
    with pytest.raises(LptError, match="a run on 2 other classes"):
        report_again(copy, against=[other])
    with pytest.raises(LptError, match="holds no finished run"):
        report_again(tmp_path)
    (copy / "predictions.safetensors").write_bytes(b"x")
    with pytest.raises(LptError, match="cannot be read"):
        report_again(copy)


def test_without_the_images_it_says_so(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "mine")
    write_page(tmp_path / "mine")
    text = (tmp_path / "mine" / "report.html").read_text()
    assert "The images were not at hand." in text and "<figure>" not in text


def test_a_report_of_another_version_is_told(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "mine")
    report = json.loads((finished / "report.json").read_text())
    del report["ece"]
    (tmp_path / "mine" / "report.json").write_text(json.dumps(report))
    with pytest.raises(LptError, match="another version of lpt: its report has no 'ece'"):
        report_again(tmp_path / "mine")
