import io
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torchvision.transforms import InterpolationMode, v2

from benchmarks.data.photos import photo
from benchmarks.reliability.subjects import prompt_on_nano
from lpt.data import preprocess as preprocess_module
from lpt.data.preprocess import CLIP_MEAN, File, Preprocess, decoded, pixels
from lpt.data.task import Images
from lpt.engine.batches import InOrder, Progress, Stream, draw, to_views
from lpt.engine.loop import batches_ahead
from lpt.errors import DataError
from tests.support.command_line import lpt
from tests.support.small_fit import phase, session

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos(n=3, height=40, width=61, seed=0):
    """Smooth structure and noise, over the whole range, so that bicubic overshoots."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 7, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="nearest")
    noisy = smooth + 0.2 * torch.randn(n, 3, height, width, generator=generator)
    return (255 * noisy).clamp(0, 255).round().to(torch.uint8)


def reference(images, *, size, resize, mode):
    """torchvision on floats: on uint8 it rounds after the resize."""
    transform = v2.Compose(
        [
            v2.Resize(resize, interpolation=mode, antialias=True),
            v2.Lambda(lambda x: x.clamp(0, 255) / 255),
            v2.CenterCrop(size),
            v2.Normalize(MEAN, STD),
        ]
    )
    return transform(images.float())


MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    ("height", "width", "size", "crop_ratio"),
    [
        (32, 32, 48, 1.0),  # square, upwards
        (40, 60, 32, 1.0),  # downwards
        (60, 40, 32, 1.0),
        (41, 61, 28, 0.875),
        (61, 41, 28, 0.875),
        (32, 32, 224, 0.9),  # timm: floor(224 / 0.9) = 248 (protocols spec 8)
        (50, 83, 112, 0.9),
        (97, 53, 56, 0.95),
        (32, 47, 32, 1.0),  # no resize
    ],
)
def test_the_test_view_is_torchvisions_resize_and_centre_crop(height, width, size, crop_ratio, mode):
    images = photos(height=height, width=width)
    preprocess = Preprocess(size=size, mean=MEAN, std=STD, interpolation=mode, crop_ratio=crop_ratio)
    view = preprocess.test(images)
    expected = reference(images, size=size, resize=math.floor(size / crop_ratio), mode=MODES[mode])
    assert view.shape == (3, 3, size, size)
    torch.testing.assert_close(view, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize(
    "architecture", ["deit_tiny_patch16_224.fb_in1k", "vit_base_patch16_224.augreg_in21k", "vit_small_patch14_dinov2"]
)
def test_the_test_view_is_timms_own(architecture, size):
    import timm
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(architecture).to_dict())
    config["input_size"] = (3, size, size)
    steps = create_transform(**config, is_training=False).transforms
    short = next(step.size for step in steps if type(step).__name__ == "Resize")
    images = photos(n=1, height=96, width=96)
    preprocess = Preprocess(size=size, mean=MEAN, std=STD, crop_ratio=config["crop_pct"])
    expected = reference(images, size=size, resize=short, mode=InterpolationMode.BICUBIC)
    torch.testing.assert_close(preprocess.test(images), expected, rtol=0, atol=2e-3)


def test_normalisation_maps_bytes_to_standard_units():
    preprocess = Preprocess(size=8, mean=MEAN, std=STD)
    for byte in (0, 100, 255):
        view = preprocess.test(torch.full((1, 3, 8, 8), byte, dtype=torch.uint8))
        expected = [(byte / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)]
        assert view[0, :, 3, 5].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_test_view_never_leaves_the_range_of_bytes():
    images = 255 * (torch.arange(16) // 4 % 2).to(torch.uint8).expand(1, 3, 16, 16)
    view = Preprocess(size=64).test(images)
    assert view.min() >= -1 - 1e-6 and view.max() <= 1 + 1e-6


@pytest.mark.parametrize("height", [16, 24])
def test_a_view_leaves_its_image_alone(height):
    images = photos(height=height, width=height)
    kept = images.clone()
    preprocess = Preprocess(size=16)
    preprocess.test(images)
    preprocess.train(images, chances(3))
    assert torch.equal(images, kept)


def chances(n, seed=0):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(seed))


def full_area(*, flip):
    """The whole image at ratio 1."""
    return torch.tensor([[1.0, 0.5, 0.3, 0.7, 0.2 if flip else 0.8]])


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 48), (40, 61, 24), (16, 16, 16)])
def test_a_full_training_view_is_the_antialiased_resize(height, width, size):
    images = photos(height=height, width=width)
    for mode in ("bilinear", "bicubic"):
        view = Preprocess(size=size, interpolation=mode).train(images, full_area(flip=False).expand(3, -1))
        expected = F.interpolate(images.float(), size=(size, size), mode=mode, antialias=True).clamp(0, 255)
        torch.testing.assert_close(view, expected / 127.5 - 1, rtol=0, atol=1e-4)


def test_a_view_flips_exactly_below_one_half():
    images = photos(n=1)
    preprocess = Preprocess(size=24)
    straight = preprocess.train(images, full_area(flip=False))
    for value in (0.0, 0.25, 0.4999, 0.5, 0.75, 0.9999):
        chance = full_area(flip=False)
        chance[:, 4] = value
        expected = straight.flip(-1) if value < 0.5 else straight
        torch.testing.assert_close(preprocess.train(images, chance), expected, rtol=0, atol=1e-4)
        unflipped = preprocess.with_(flip=False).train(images, chance)
        torch.testing.assert_close(unflipped, straight, rtol=0, atol=1e-4)


def test_a_training_view_is_a_pure_function_of_its_chance_numbers():
    images, preprocess = photos(), Preprocess(size=24)
    torch.manual_seed(1)
    first = preprocess.train(images, chances(3))
    torch.manual_seed(2)
    assert torch.equal(preprocess.train(images, chances(3)), first)
    assert not torch.equal(preprocess.train(images, chances(3, seed=1)), first)


def test_every_image_has_its_own_crop():
    images = photos(n=1).expand(6, -1, -1, -1)
    views = Preprocess(size=24).train(images, chances(6))
    for i in range(6):
        for j in range(i):
            assert (views[i] - views[j]).abs().max() > 0.1


def test_a_view_does_not_depend_on_the_rest_of_the_batch():
    images, chance, preprocess = photos(n=5), chances(5), Preprocess(size=24, crop_ratio=0.9)
    train, test = preprocess.train(images, chance), preprocess.test(images)
    for i in range(5):
        torch.testing.assert_close(preprocess.train(images[i : i + 1], chance[i : i + 1])[0], train[i])
        torch.testing.assert_close(preprocess.test(images[i : i + 1])[0], test[i])


def crop_boxes(preprocess, chance, side=200):
    """(left, top, width, height) of each view as fractions, read off an image of two ramps."""
    ramp = torch.arange(side, dtype=torch.uint8)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), ramp.expand(side, side)])
    pixels = (preprocess.train(image.expand(len(chance), -1, -1, -1), chance) + 1) * 127.5
    cells = preprocess.size
    ranges = []
    for channel, axis in ((0, -1), (1, -2)):
        line = pixels[:, channel].double().mean(-3 - axis)  # over the other axis
        line = torch.where((line[:, -1:] < line[:, :1]), line.flip(1), line)
        # Two inner points of a straight line, so that the border's padding does not bend it.
        a, b = cells // 4, 3 * cells // 4
        step = (line[:, b] - line[:, a]) / (b - a)
        start = line[:, a] - step * (a + 0.5) + 0.5
        ranges.append((start / side, step * cells / side))
    (left, width), (top, height) = ranges
    return left, top, width, height


@pytest.mark.parametrize("min_area", [0.08, 0.7])
def test_crops_lie_inside_the_image_with_the_promised_area_and_ratio(min_area):
    chance = chances(300)
    preprocess = Preprocess(size=32, min_area=min_area)
    left, top, width, height = crop_boxes(preprocess, chance)
    area, ratio = width * height, width / height
    whole = (width < 0.999) & (height < 0.999)  # a box wider than the image is cut to it
    torch.testing.assert_close(area[whole], (min_area + (1 - min_area) * chance[whole, 0]).double(), rtol=0, atol=2e-3)
    assert area.min() > min_area * (3 / 4) ** 0.5 - 2e-3 and area.max() <= 1 + 2e-3
    assert ratio.min() >= 3 / 4 - 2e-3 and ratio.max() <= 4 / 3 + 2e-3
    assert min(left.min(), top.min()) >= -2e-3
    assert max((left + width).max(), (top + height).max()) <= 1 + 2e-3
    torch.testing.assert_close(left, chance[:, 2].double() * (1 - width), rtol=0, atol=2e-3)
    torch.testing.assert_close(top, chance[:, 3].double() * (1 - height), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_come_in_the_dtype_asked_for(dtype):
    images, preprocess = photos(), Preprocess(size=24)
    assert preprocess.test(images, dtype=dtype).dtype == dtype
    assert preprocess.train(images, chances(3), dtype=dtype).dtype == dtype


def test_a_very_long_image_needs_no_very_large_matrix():
    view = Preprocess(size=32).test(torch.zeros(1, 3, 1, 20_000, dtype=torch.uint8))
    assert view.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", ["lift", "lpt"])
@pytest.mark.parametrize("shape", [(40, 60), (64, 64), (90, 33)])
def test_published_pipelines_are_torchvisions(name, shape):
    """Resize(256) of the shorter side, or of a square, then the centre 224: here at 28 of 32 pixels."""
    images = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = Preprocess(size=28).as_published(name)
    resize = v2.Resize((32, 32) if name == "lpt" else 32, v2.InterpolationMode.BILINEAR, antialias=True)
    wanted = v2.CenterCrop(28)(resize(images.float())) / 255
    assert (ours.test(images) * 0.5 + 0.5 - wanted).abs().max() < 0.01 and ours.min_area == 0.08
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="png")
        files.append(File("x", buffer.getvalue()))
    assert (ours.cut(files) / 255 - wanted).abs().max() < 0.02


def test_lift_keeps_clips_statistics_and_timm_is_the_backbones_own():
    clip = Preprocess(mean=CLIP_MEAN, std=(0.26862954, 0.26130258, 0.27577711), crop_ratio=0.9)
    assert clip.as_published("lift").mean == CLIP_MEAN and clip.as_published("lpt").mean == (0.5, 0.5, 0.5)
    assert clip.as_published("timm") == clip


def test_a_huge_image_of_few_bytes_is_refused():
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 50_000
    with pytest.raises(DataError, match=r"image x cannot be decoded .9000 x 9000 pixels, 33554432 are the most"):
        decoded(File("x", buffer.getvalue()))


def encoded(kind, mode, width, height):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "side", "needed"), [("PNG", "1", 6000, 36_000_000), ("BMP", "1", 5800, 33_640_000),
                                         ("TIFF", "F", 3000, 36_000_000), ("PNG", "1", 13_500, 182_250_000)],
)  # fmt: skip
def test_an_image_above_the_limit_has_a_way_out_that_its_sentence_names(monkeypatch, kind, mode, side, needed):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    file = File("x", encoded(kind, mode, side, side))
    with pytest.raises(DataError, match=rf"are the most: make it smaller, or set .* LPT_MAX_PIXELS={needed} if you"):
        decoded(file)
    monkeypatch.setenv("LPT_MAX_PIXELS", str(needed - 1))
    with pytest.raises(DataError, match=rf"LPT_MAX_PIXELS={needed}"):
        decoded(file)
    monkeypatch.setenv("LPT_MAX_PIXELS", str(needed))
    assert decoded(file).size == (side, side)


@pytest.mark.parametrize("text", ["many", "-5", "0", "1e9", "9" * 40])
def test_a_limit_that_is_no_number_of_pixels_is_said(monkeypatch, text):
    monkeypatch.setenv("LPT_MAX_PIXELS", text)
    with pytest.raises(DataError, match=r"LPT_MAX_PIXELS is .*: give a number"):
        decoded(File("x", encoded("PNG", "RGB", 4, 4)))


def test_by_command_line_too_and_the_limit_may_be_lower(tmp_path, monkeypatch, capsys):
    for name, side in (("small.png", 8), ("large.png", 40)):
        (tmp_path / name).write_bytes(encoded("PNG", "RGB", side, side))
    prompt = tmp_path / "p.safetensors"
    prompt_on_nano(prompt)
    code, said, err = lpt(capsys, "predict", prompt, tmp_path / "small.png", tmp_path / "large.png")
    assert code == 0 and len(said.splitlines()) == 2, err
    monkeypatch.setenv("LPT_MAX_PIXELS", "1000")
    code, said, err = lpt(capsys, "predict", prompt, tmp_path / "small.png", tmp_path / "large.png")
    assert code == 1 and len(said.splitlines()) == 1 and "LPT_MAX_PIXELS=1600" in err


def test_a_large_jpeg_is_made_smaller_before_it_is_judged(monkeypatch):
    monkeypatch.setattr("lpt.data.preprocess.MAX_PIXELS", 10_000)
    buffer = io.BytesIO()
    Image.new("RGB", (640, 640)).save(buffer, "JPEG")
    assert decoded(File("x", buffer.getvalue()), min_side=64).size == (80, 80)
    with pytest.raises(DataError, match="640 x 640 pixels"):
        decoded(File("x", buffer.getvalue()))


def test_a_long_strip_and_a_jpeg_of_many_scans_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (2**16 + 1, 1)).save(buffer, "PNG")
    with pytest.raises(DataError, match="65537 x 1 pixels, 65536 a side are the most: make it smaller"):
        decoded(File("x", buffer.getvalue()))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 199)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    assert decoded(File("x", whole), min_side=16).size == (16, 16)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    (tmp_path / "x.jpg").write_bytes(whole[:-2] + 200 * scan + b"\xff\xd9")
    with pytest.raises(DataError, match=r"2\d\d scans, 100 are the most: save it anew"):
        decoded(File("x", tmp_path / "x.jpg"))


def test_numbers_of_32_bits_have_a_fourth_of_the_pixels(monkeypatch):
    monkeypatch.setattr("lpt.data.preprocess.MAX_PIXELS", 10_000)
    buffer = io.BytesIO()
    Image.new("F", (60, 60)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="60 x 60 pixels, 2500 are the most"):
        decoded(File("x", buffer.getvalue()))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="there is no such file"):
        decoded(File("pipe.jpg", str(tmp_path / "pipe.jpg")))


def test_formats_that_run_programs_are_not_read():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="cannot identify"):
        decoded(File("x", script))


def jpeg(image, **how):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 92} | how)
    return File("x.jpg", buffer.getvalue())


def test_views_stay_what_they_are_when_the_next_image_is_decoded():
    """Also one that is as large as its view, and is not resampled."""
    first, second = (File(str(i), photo(i, side=224)) for i in range(2))
    square = Preprocess(size=224, square=True)
    for preprocess in (square, square.with_(crop_ratio=0.9), square.with_(cutter="pillow")):
        for chance in (None, torch.full((1, 5), 0.3)):
            view = preprocess.cut_one(first, chance)
            before = view.clone()
            preprocess.cut_one(second, chance)
            assert torch.equal(view, before)
    same_size = Image.fromarray(photos(1, 224, 224)[0].permute(1, 2, 0).numpy())
    view = square.cut_one(jpeg(same_size), None)
    before = view.clone()
    square.cut_one(jpeg(same_size.rotate(90)), None)
    assert torch.equal(view, before)


@pytest.mark.parametrize("orientation", range(10))
def test_a_jpeg_is_decoded_to_the_bytes_that_pillow_gives(orientation):
    """Upright too: 0 and 9 are no orientations."""
    image = Image.fromarray(photos(1, 45, 61)[0].permute(1, 2, 0).numpy())
    exif = image.getexif()
    exif[274] = orientation
    kinds = [jpeg(image.convert(mode), exif=exif, **how)
             for mode, how in [("RGB", {}), ("RGB", {"subsampling": 0}), ("RGB", {"progressive": True}), ("L", {}),
                               ("CMYK", {}), ("RGB", {"keep_rgb": True})]]  # fmt: skip
    for file in kinds:
        expected = torch.from_numpy(np.array(decoded(file))).permute(2, 0, 1)
        assert torch.equal(pixels(file), expected) and pixels(file).dtype == torch.uint8
        smaller = torch.from_numpy(np.array(decoded(file, min_side=20))).permute(2, 0, 1)
        assert torch.equal(pixels(file, min_side=20), smaller) and min(smaller.shape[1:]) < 45


def test_what_pillow_says_of_a_damaged_jpeg_is_said():
    whole = jpeg(Image.fromarray(photos(1, 45, 61)[0].permute(1, 2, 0).numpy())).content
    for content in (whole[:-40], whole[: len(whole) // 2], whole[:200], whole[:100] + b"x" * 50 + whole[150:]):
        file, said = File("x.jpg", content), []
        for decode in (decoded, pixels):
            try:
                decode(file)
                said.append("fine")
            except DataError as error:
                said.append(str(error))
        assert said[0] == said[1]


@pytest.mark.parametrize(("interpolation", "min_area"), [("bicubic", 0.7), ("bilinear", 0.08)])
def test_views_of_photos_stay_near_those_that_pillow_cut_before(interpolation, min_area):
    """In 1/255, as docs/data.md says: a training view is of whole pixels now, and shifted by up to half of one."""
    before = Preprocess(crop_ratio=0.9, interpolation=interpolation, min_area=min_area, cutter="pillow")
    now = before.with_(cutter="torch")
    files = [File(str(i), photo(i)) for i in range(24)]
    test = (before.cut(files).float() - now.cut(files).float()).abs()
    assert test.mean() <= 0.1 and test.max() <= 2
    chance = chances(len(files))
    train = (before.cut(files, chance).float() - now.cut(files, chance).float()).abs()
    assert train.mean() <= 3 and train.max() <= 150
    assert train.mean() > 0.1, "nothing has changed, and this test can go"


def test_prompt_files_of_before_keep_pillows_views(tmp_path):
    from lpt.prompt_file import read_prompt

    prompt_on_nano(tmp_path / "p.safetensors")
    header, _ = read_prompt(tmp_path / "p.safetensors")
    assert header.preprocess.cutter == "torch"
    fields = header.model_dump()
    del fields["preprocess"]["cutter"]
    before = type(header).model_validate(fields).preprocess
    assert Preprocess(**vars(before)) == header.preprocess.with_(cutter="pillow")


@pytest.mark.parametrize(("epochs", "base"), [(1, 0.08), (2, 0.08), (10, 0.08), (5, 0.5)])
def test_mda_crops_grow_from_the_base_to_the_whole_image(epochs, base):
    fixed = Preprocess(size=32, min_area=base)
    mda = fixed.with_(crops="mda")
    for e in range(epochs):
        assert fixed.in_epoch(e, epochs) == fixed
        t = 0.0 if epochs == 1 else e / (epochs - 1)
        expected = base + (1 - base) * (1 - math.sqrt(1 - t**2))
        assert mda.in_epoch(e, epochs).min_area == pytest.approx(expected)
    assert mda.in_epoch(epochs - 1, epochs).min_area == pytest.approx(base if epochs == 1 else 1.0)


@pytest.mark.parametrize(("width", "height"), [(61, 40), (40, 61), (48, 48), (200, 20)])
def test_mda_crops_are_squares_within_the_image_of_an_area_as_drawn(width, height):
    mda, chance = Preprocess(crops="mda", min_area=0.2), chances(50)
    crop = mda._crop(chance, width, height)
    for i, (area, place_x, place_y) in enumerate(chance[:, (0, 2, 3)].tolist()):
        side = min(math.sqrt((0.2 + 0.8 * area) * width * height), width, height)
        assert crop.width[i].item() == pytest.approx(side, rel=1e-5) == crop.height[i].item()
        assert crop.left[i].item() == pytest.approx(place_x * (width - side), rel=1e-4, abs=1e-3)
        assert crop.top[i].item() == pytest.approx(place_y * (height - side), rel=1e-4, abs=1e-3)


def test_training_batches_have_the_crops_of_their_epoch():
    """Of files and of images in memory, in any order of the steps: a resumed run has those of an undisturbed one."""
    images = photos(8)
    mda = Preprocess(size=16, crops="mda", min_area=0.08, cutter="pillow")
    bound = session(images=Images(images, torch.arange(8) % 3, tuple(map(str, range(8)))), preprocess=mda)
    one = phase(streams={"all": Stream(InOrder(8, 4))}, steps=6, steps_per_epoch=2)
    seen = []
    for first in (0, 3):
        with batches_ahead(one, bound, first) as batches:
            seen.append({p.step: (p, drawn) for p, drawn in batches})
    for step, (progress, drawn) in seen[0].items():
        cut = mda.in_epoch(step // 2, 3)
        views = to_views(drawn, mda.in_epoch(progress.epoch, progress.epochs), torch.device("cpu"), torch.float32)
        expected = cut.train(images[one.streams["all"].sampler.batch(step)], progress.chance("view/all", 4, 5))
        assert torch.equal(views["all"].views, expected)
        if step >= 3:
            assert torch.equal(seen[1][step][1]["all"].content, drawn["all"].content)


def test_training_views_of_files_have_the_crops_of_their_epoch():
    files = [File(str(i), photo(i)) for i in range(4)]
    mda = Preprocess(size=32, crops="mda", min_area=0.08)
    source = SimpleNamespace(
        labels=torch.zeros(4, dtype=torch.long), take=lambda rows: [files[i] for i in rows.tolist()]
    )
    for step in (0, 5):
        progress = Progress("p", step, 6, 1, 0)
        drawn = draw({"all": Stream(InOrder(4, 4))}, progress, source, mda)
        rows = InOrder(4, 4).batch(step).tolist()
        expected = mda.in_epoch(step, 6).cut([files[i] for i in rows], progress.chance("view/all", 4, 5))
        assert torch.equal(drawn["all"].content, expected)


# Five crops.


@pytest.mark.parametrize(("height", "width", "size"), [(40, 61, 32), (61, 40, 28), (50, 50, 112), (97, 53, 56)])
@pytest.mark.parametrize("mode", list(MODES))
def test_five_crops_are_torchvisions_of_an_image_resized_to_248_of_224(height, width, size, mode):
    images = photos(2, height, width)
    five = Preprocess(size=size, mean=MEAN, std=STD, interpolation=mode, crop_ratio=0.7, five_crops=True)
    resized = v2.Compose([v2.Resize(size * 248 // 224, interpolation=MODES[mode], antialias=True)])(images.float())
    expected = torch.stack(v2.FiveCrop(size)(resized.clamp(0, 255) / 255), dim=1)
    expected = (expected - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(five.test(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cutter", ["torch", "pillow"])
def test_five_crops_of_a_file_are_cut_from_one_decoding(cutter, monkeypatch):
    file, five = File("a", photo(3)), Preprocess(size=64, cutter=cutter, five_crops=True)
    opened = []
    monkeypatch.setattr(
        preprocess_module, "_open", lambda content, really=preprocess_module._open: opened.append(1) or really(content)
    )
    views = five.cut([file])
    assert views.shape == (1, 5, 3, 64, 64) and len(opened) == 1
    image = decoded(file, min_side=2 * (64 * 248 // 224))
    side = 64 * 248 // 224
    whole = v2.Resize(side, interpolation=MODES["bicubic"], antialias=True)(
        torch.from_numpy(np.array(image)).permute(2, 0, 1)
    )
    expected = torch.stack(v2.FiveCrop(64)(whole))
    assert (views[0].float() - expected.float()).abs().mean() < 1
    assert Preprocess(size=64, cutter=cutter).cut([file]).shape == (1, 3, 64, 64)


def test_neither_five_crops_nor_fixed_ones_are_in_a_prompt_file(tmp_path):
    from lpt.prompt_file import read_prompt, save_prompt
    from tests.support.toy import prompted, small_backbone, toy_task

    for crops in ("fixed", "mda"):
        model = prompted(small_backbone(), num_classes=4)
        model.backbone.preprocess = model.backbone.preprocess.with_(crops=crops, five_crops=True)
        save_prompt(tmp_path / "p.safetensors", model, method="lpt", counts=toy_task().counts)
        with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
            stored = json.loads(file.metadata()["lpt"])["preprocess"]
        assert "five_crops" not in stored and stored.get("crops") == (None if crops == "fixed" else "mda")
        assert read_prompt(tmp_path / "p.safetensors").header.preprocess.crops == crops
