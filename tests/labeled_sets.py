# SPDX-License-Identifier: Apache-2.0
"""One small set of labeled images, written in every format that :mod:`mmeformer.formats` reads."""

import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import yaml
from PIL import Image

from mmeformer.rotated.dota import format_label
from mmeformer.rotated_boxes import corners

WIDTH, HEIGHT = 64, 48
CLASSES = ("boat", "car")
NAMES = ("apple", "bread", "cheese", "date", "egg", "fig")
# center x, center y, width, height, angle in radians, class; per image
BOXES = {
    name: [
        (18.0 + index, 16.0, 20.0, 9.0, 0.3 + 0.2 * index, index % 2),
        (46.0, 30.0 - index, 16.0, 12.0, -0.5, (index + 1) % 2),
    ]
    for index, name in enumerate(NAMES)
}


OBJECT_COLORS = ((40, 200, 250), (250, 120, 60))
"""Of the classes in the images: blue, green, red."""


def quadrilaterals(name: str) -> np.ndarray:
    """Corners (N, 4, 2) of the objects of an image."""
    return corners(np.array([box[:5] for box in BOXES[name]]))


def labels(name: str) -> list[int]:
    """Classes of the objects of an image."""
    return [box[5] for box in BOXES[name]]


def outline(name: str, index: int) -> np.ndarray:
    """An outline (5, 2) of an object: its corners, and the middle of the last side."""
    quad = quadrilaterals(name)[index]
    return np.concatenate([quad, (quad[3:] + quad[:1]) / 2])


def filled(name: str, index: int) -> np.ndarray:
    """Mask (H, W) uint8 of an object's outline."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    return cv2.fillPoly(mask, [np.rint(outline(name, index)).astype(np.int32)], 1)


def upright(name: str) -> np.ndarray:
    """Upright boxes (N, 4) around the objects of an image: x, y, width, height."""
    quads = quadrilaterals(name)
    low, high = quads.min(1), quads.max(1)
    return np.concatenate([low, high - low], 1)


def write_images(folder: Path, names=NAMES, suffix=".png") -> None:
    """Images of noise with the objects filled."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        image = np.random.default_rng(len(name)).integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8)
        for quad, label in zip(quadrilaterals(name), labels(name), strict=True):
            cv2.fillPoly(image, [np.rint(quad).astype(np.int32)], OBJECT_COLORS[label])
        assert cv2.imwrite(str(folder / f"{name}{suffix}"), image)


def write_coco(
    root: Path,
    *,
    names=NAMES,
    images="images",
    file="labels.json",
    masks="polygons",
    prefix="",
    first_category=1,
    more_categories=(),
) -> Path:
    """COCO JSON at ``root/file``, images in ``root/images``; returns the JSON file."""
    write_images(root / images, names)
    annotations = []
    for number, name in enumerate(names):
        for index, (box, label) in enumerate(zip(upright(name), labels(name), strict=True)):
            entry = dict(
                id=len(annotations),
                image_id=number,
                category_id=label + first_category,
                bbox=box.tolist(),
                segmentation=[],
            )
            if masks == "polygons":
                entry["segmentation"] = [outline(name, index).ravel().tolist()]
            elif masks == "rle":
                flat = filled(name, index).ravel(order="F")
                edges = np.flatnonzero(np.diff(flat)) + 1
                runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
                entry["segmentation"] = dict(size=[HEIGHT, WIDTH], counts=runs)
            annotations.append(entry)
    content = dict(
        images=[
            dict(id=number, file_name=f"{prefix}{name}.png", width=WIDTH, height=HEIGHT)
            for number, name in enumerate(names)
        ],
        annotations=annotations,
        categories=[
            *more_categories,
            *(dict(id=i + first_category, name=name) for i, name in enumerate(CLASSES)),
        ],
    )
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def _shares(values) -> str:
    scaled = np.asarray(values).reshape(-1, 2) / (WIDTH, HEIGHT)
    return " ".join(f"{value:.8f}" for value in scaled.ravel())


def yolo_lines(name: str, kind: str) -> str:
    """Label file of an image: ``detect``, ``segment`` or ``obb``."""
    lines = []
    for index, label in enumerate(labels(name)):
        if kind == "detect":
            x, y, width, height = upright(name)[index]
            values = _shares([x + width / 2, y + height / 2, width, height])
        elif kind == "segment":
            values = _shares(outline(name, index))
        else:
            values = _shares(quadrilaterals(name)[index])
        lines.append(f"{label} {values}\n")
    return "".join(lines)


def write_yolo(root: Path, kind="detect", *, yaml_file=True) -> Path:
    """``images/{train,val}`` and ``labels/{train,val}``, with ``data.yaml``."""
    for split, names in (("train", NAMES[:4]), ("val", NAMES[4:])):
        write_images(root / "images" / split, names, ".jpg")
        (root / "labels" / split).mkdir(parents=True)
        for name in names:
            path = root / "labels" / split / f"{name}.txt"
            path.write_text(yolo_lines(name, kind))
    if yaml_file:
        content = dict(path="../elsewhere", train="images/train", val="images/val")
        content["names"] = dict(enumerate(CLASSES))
        (root / "data.yaml").write_text(yaml.safe_dump(content))
    return root


def write_voc(root: Path, kind="boxes", *, database="Unknown") -> Path:
    """``JPEGImages``, ``Annotations`` and ``ImageSets/Main`` with splits."""
    write_images(root / "JPEGImages", suffix=".jpg")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for name in NAMES:
        xml = ElementTree.Element("annotation")
        ElementTree.SubElement(xml, "filename").text = f"{name}.jpg"
        source = ElementTree.SubElement(xml, "source")
        ElementTree.SubElement(source, "database").text = database
        size = ElementTree.SubElement(xml, "size")
        for key, value in (("width", WIDTH), ("height", HEIGHT), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(value)
        for box, flat, label in zip(BOXES[name], upright(name), labels(name), strict=True):
            entry = ElementTree.SubElement(xml, "object")
            ElementTree.SubElement(entry, "name").text = CLASSES[label]
            if kind == "rotated":
                found = ElementTree.SubElement(entry, "robndbox")
                values = dict(zip(("cx", "cy", "w", "h", "angle"), box[:5], strict=True))
            else:
                found = ElementTree.SubElement(entry, "bndbox")
                first = 1 if "VOC" in database else 0
                x, y, width, height = flat
                values = dict(xmin=x + first, ymin=y + first, xmax=x + width, ymax=y + height)
            for key, value in values.items():
                ElementTree.SubElement(found, key).text = str(value)
        ElementTree.ElementTree(xml).write(root / "Annotations" / f"{name}.xml")
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(NAMES[:4]) + "\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("\n".join(NAMES[4:]) + "\n")
    return root


def write_labelme(root: Path, shape="polygon") -> Path:
    """Images and JSON files side by side."""
    write_images(root, suffix=".jpg")
    for name in NAMES:
        shapes = []
        for index, label in enumerate(labels(name)):
            x, y, width, height = upright(name)[index].tolist()
            points = {
                "polygon": outline(name, index).tolist(),
                "rectangle": [[x + width, y], [x, y + height]],
                "rotation": quadrilaterals(name)[index].tolist(),
            }[shape]
            shapes.append(
                dict(label=CLASSES[label], points=points, shape_type=shape, group_id=None)
            )
        content = dict(imagePath=f"..\\photos\\{name}.jpg", shapes=shapes)
        content.update(imageWidth=WIDTH, imageHeight=HEIGHT, imageData=None)
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def write_dota(root: Path, *, splits=True) -> Path:
    """``{train,val}/images`` and ``{train,val}/labelTxt``, with header lines."""
    parts = (("train", NAMES[:4]), ("val", NAMES[4:])) if splits else ((".", NAMES),)
    for split, names in parts:
        write_images(root / split / "images", names)
        (root / split / "labelTxt").mkdir(parents=True)
        for name in names:
            lines = ["imagesource:GoogleEarth", "gsd:0.25"] + [
                format_label(quad, CLASSES[label], index)
                for index, (quad, label) in enumerate(
                    zip(quadrilaterals(name), labels(name), strict=True)
                )
            ]
            (root / split / "labelTxt" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def mask_of(name: str) -> np.ndarray:
    """Labels (H, W): 0 background, 1 boat, 2 car; the first two rows are unlabeled (255)."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for quad, label in zip(quadrilaterals(name), labels(name), strict=True):
        cv2.fillPoly(mask, [np.rint(quad).astype(np.int32)], label + 1)
    mask[:2] = 255
    return mask


COLORS = {0: (0, 0, 0), 1: (200, 30, 40), 2: (20, 90, 250), 255: (255, 255, 255)}


def write_masks(root: Path, kind="ids", *, values=None) -> Path:
    """``images/{train,val}`` and ``masks/{train,val}``: ``ids``, ``palette`` or ``colors``.

    Args:
        values: value in the files by label; None writes the labels.
    """
    for split, names in (("train", NAMES[:4]), ("val", NAMES[4:])):
        write_images(root / "images" / split, names, ".jpg")
        (root / "masks" / split).mkdir(parents=True)
        for name in names:
            mask = mask_of(name)
            path = root / "masks" / split / f"{name}.png"
            if kind == "colors":
                colors = np.zeros((*mask.shape, 3), np.uint8)
                for label, color in COLORS.items():
                    colors[mask == label] = color
                Image.fromarray(colors).save(path)
                continue
            if values is not None:
                table = np.arange(256, dtype=np.uint8)
                for label, value in values.items():
                    table[label] = value
                mask = table[mask]
            image = Image.fromarray(mask)
            if kind == "palette":
                palette = np.zeros((256, 3), np.uint8)
                for label, color in COLORS.items():
                    palette[label] = color
                image.putpalette(palette.ravel().tolist())
            image.save(path)
    return root


def write_folders(root: Path, *, splits=True) -> Path:
    """``train/boat/apple.jpg`` and the like; without splits ``boat/apple.jpg``."""
    parts = (("train", NAMES[:4]), ("val", NAMES[4:])) if splits else ((".", NAMES),)
    for split, names in parts:
        for index, name in enumerate(names):
            write_images(root / split / CLASSES[index % 2], [name], ".jpg")
    return root
