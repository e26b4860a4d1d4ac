"""The body of a request as questions: JSON with base64 images, or an upload of image files. No URL is ever fetched."""

import base64
import binascii
from dataclasses import dataclass
from email.message import Message
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lpt.errors import quoted
from lpt.server.limits import Limits, Refusal
from lpt.settings import validated

FORM, JSON = "multipart/form-data", "application/json"
MOST_FIELD = 4096
"""Bytes of a form's field that is no file."""
MOST_LISTED = 1000
"""Images or tasks in a list, whatever the limits of the server are."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Fields(BaseModel):
    """What is asked about images."""

    model_config = ConfigDict(extra="forbid")

    tasks: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        min_length=1,
        max_length=MOST_LISTED,
        description="one task for all images, or one for each; auto finds the task by the image",
    )
    every_task: bool = Field(False, description="ask every task about every image, and not one about each")
    topk: int = Field(5, ge=1, le=1000, description="classes in each answer")


class PredictBody(Fields):
    images: list[str] = Field(
        min_length=1, max_length=MOST_LISTED, description="image files in base64, such as JPEG or PNG; no URLs"
    )


@dataclass(frozen=True)
class Asking:
    """`images[i]` are the bytes of an encoded image, or why there are none, and `names[i]` is what it is called; each
    of `questions` is the number of an image and the name of a task."""

    images: list[bytes | Refusal]
    names: list[str]
    questions: list[tuple[int, str]]
    topk: int


def asking(content_type: str, body: bytes, limits: Limits) -> Asking:
    """What a request asks. Raises Refusal (400, 413, 415) with one sentence."""
    kind, boundary = _kind_of(content_type)
    if kind == FORM:
        fields, images, names = _form(body, boundary, limits)
        given = _checked(Fields, fields)
    elif kind == JSON:
        given = _checked(PredictBody, _json(body, limits))
        images = [_decoded(text, number) for number, text in enumerate(given["images"], 1)]
        names = [str(number) for number in range(1, len(images) + 1)]
    else:
        raise Refusal(415, f"the body is {quoted(kind or 'of no kind', 80)}: send {FORM} or {JSON}")
    questions = _questions(len(images), given["tasks"], given["every_task"], limits)
    return Asking(images, names, questions, given["topk"])


def _questions(images: int, tasks: list[str], every_task: bool, limits: Limits) -> list[tuple[int, str]]:
    number = images * len(tasks) if every_task else images
    if number > limits.questions:
        raise Refusal(413, f"{number} questions in one request, {limits.questions} are the most: send several requests")
    if every_task:
        return [(i, task) for i in range(images) for task in tasks]
    if len(tasks) not in (1, images):
        raise Refusal(400, f"{images} images and {len(tasks)} tasks: give one task, one for each, or every_task=true")
    return [(i, tasks[i % len(tasks)]) for i in range(images)]


def _kind_of(content_type: str) -> tuple[str, str | None]:
    """(media type, boundary) of a header."""
    message = Message()
    message["content-type"] = " ".join(content_type[:1000].split())
    boundary = message.get_param("boundary")
    return message.get_content_type() if content_type else "", boundary if isinstance(boundary, str) else None


def _checked(schema: type[Fields], given: dict[str, Any]) -> dict[str, Any]:
    values, mistakes = validated("request", schema, given)
    if mistakes:
        raise Refusal(400, "; ".join(mistakes[:5]))
    return values


def _json(body: bytes, limits: Limits) -> dict[str, Any]:
    """An object. What is small as text may be large as a tree: values are counted before there is one."""
    from pydantic_core import from_json

    most = 100 + 10 * limits.questions
    if body.count(b",") + body.count(b"[") + body.count(b"{") > most:
        raise Refusal(400, f"the JSON has more than {most} values: images, tasks and topk are fewer")
    try:
        tree = from_json(body)
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON ({quoted(error, 120)})") from None
    if not isinstance(tree, dict):
        raise Refusal(400, "the JSON is no object: send images and tasks")
    return tree


def _decoded(text: str, number: int) -> bytes | Refusal:
    """The bytes of an image in base64, perhaps as a `data:` address; or what is wrong with it."""
    if text[:5].lower() == "data:":
        text = text.partition(",")[2]
    elif text[:8].lower().startswith(("http:", "https:", "file:", "ftp:", "hf:")):
        return Refusal(422, f"image {number} is an address: send the image itself in base64, nothing is fetched")
    try:
        content = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        return Refusal(422, f"image {number} is not in base64")
    return content or Refusal(422, f"image {number} is empty")


def _form(body: bytes, boundary: str | None, limits: Limits) -> tuple[dict[str, Any], list[bytes | Refusal], list[str]]:
    """(the fields that are no files, the files, what these are called) of a form."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import FormParser

    fields: dict[str, Any] = {}
    images: list[bytes | Refusal] = []
    names: list[str] = []
    ended: list[bool] = []

    def on_field(field: Any) -> None:
        name, value = _text(field.field_name), _text(field.value or b"")
        if len(value) > MOST_FIELD:
            raise Refusal(400, f"field {quoted(name, 40)} is larger than {MOST_FIELD} bytes; images are sent as files")
        if name == "tasks":
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise Refusal(400, f"field {quoted(name, 40)} is there twice")
        else:
            fields[name] = value
        if len(fields) > 10 or len(fields.get("tasks", ())) > MOST_LISTED:
            raise Refusal(400, "the form has too many fields: send images, tasks, topk and every_task")

    def on_file(file: Any) -> None:
        if (name := _text(file.field_name)) != "images":
            raise Refusal(400, f"a file is in field {quoted(repr(name), 40)}: send it as images")
        if len(images) == limits.questions:
            raise Refusal(413, f"more than {limits.questions} images in one request: send several requests")
        file.file_object.seek(0)
        number = len(images) + 1
        images.append(file.file_object.read() or Refusal(422, f"image {number} is empty"))
        names.append(quoted(_text(file.file_name), 80) or str(number))

    if not boundary:
        raise Refusal(400, "the form has no boundary in its content-type")
    memory = {"MAX_MEMORY_FILE_SIZE": float("inf")}  # nothing is written to disk
    try:
        parser = FormParser(FORM, on_field, on_file, lambda: ended.append(True), boundary=boundary, config=memory)
        parser.write(body)
        parser.finalize()
    except Refusal:
        raise
    except Exception as error:  # FormParserError, and those of its decoders
        why = quoted(error, 120) if isinstance(error, FormParserError) else type(error).__name__
        raise Refusal(400, f"the form cannot be read ({why})") from None
    if not ended:
        raise Refusal(400, "the form breaks off before its end")
    if not images:
        raise Refusal(400, "the form has no file: send images")
    if (text := fields.get("every_task")) in ("true", "false"):
        fields["every_task"] = text == "true"
    return fields, images, names


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
