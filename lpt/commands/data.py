"""Commands on datasets: doctor, pack."""

from pathlib import Path
from typing import Annotated

import typer

from lpt.commands.arguments import Overrides
from lpt.commands.console import print


def doctor(
    root: Annotated[str, typer.Argument(help="a folder of images, or a Hub dataset id")],
    settings: Overrides = None,
) -> None:
    """Check a dataset: class counts, unreadable files, test images among the training images; exit code 1 if there is
    a problem.

    backbone.name=NAME adds which of the classes were labels in the backbone's own training.
    """
    from lpt.config import check_data, nested
    from lpt.data.doctor import examine, load_with_mistakes
    from lpt.model.backbones.labels_seen import overlap_notes
    from lpt.serve.opening import check_loading

    given = nested(settings or [])
    loading = check_loading(given, sections=("data", "backbone"))
    task = load_with_mistakes(**check_data({"name": "folder", "root": root, **given.get("data", {})}))
    findings = examine(task)
    if loading["name"]:
        findings.notes += overlap_notes(task.classes, loading["name"])
    for line in findings.facts:
        print(line)
    for line in findings.notes:
        print(f"note: {line}")
    for line in findings.problems:
        print(f"problem: {line}")
    if findings.problems:
        print(f"{len(findings.problems)} problems")
        raise typer.Exit(1)
    print("nothing stands in the way of training")


def pack(
    data: Annotated[str, typer.Argument(metavar="DATA", help="a folder of images, or a config with a data section")],
    settings: Overrides = None,
    out: Annotated[Path, typer.Option(help="output folder")] = ...,  # type: ignore[assignment]
    side: Annotated[int, typer.Option(min=16, help="largest shorter side of an image, in pixels")] = 256,
) -> None:
    """Resize a dataset's images once into a few large files, which decode faster; train from them with data.root=OUT.

    The same command resumes a killed one; at the end everything is read back and checked.
    """
    from lpt.config import check_data, load_config, nested
    from lpt.data import LOCATION_SETTINGS, load_task
    from lpt.data.packing import pack as write_pack

    if Path(data).suffix in (".yaml", ".yml") and Path(data).is_file():
        given = load_config(data, settings or []).data
    else:
        given = check_data({"name": "folder", "root": data, **nested(settings or []).get("data", {})})
    stored = {key: value for key, value in given.items() if key not in (*LOCATION_SETTINGS, "name")}
    packed = write_pack(load_task(**given), out, side=side, settings=stored, say=print)
    for role, number in packed["images"].items():
        print(f"{role:9}  {number} images")
    print(f"packed    {sum(one['bytes'] for one in packed['shards']):,} bytes; train from it with data.root={out}")
